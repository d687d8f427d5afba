"""The training loop: learning, repeating, resuming, and two ranks against one."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from repro.data import DataError
from repro.encoder import BiEncoder
from repro.lists import GradedList, collate
from repro.runs import RunError
from repro.train import LOSSES, TrainConfig, TrainError, batch_loss, learning_rate, loss_function, main, train, training_lists

TOPICS = ["bread dough rise", "moon tide", "iron rust", "coffee beans roast", "engine oil change", "cat sleep", "sky blue", "heart rate normal"]


def lists(count: int = 16) -> list[GradedList]:
    """Queries about a topic; grade 3 holds all of its words, 2 the first, 1 another of them, 0 none."""
    made = []
    for n in range(count):
        words = TOPICS[n % len(TOPICS)].split()
        other = TOPICS[(n + 1) % len(TOPICS)]
        passages = [f"the {' '.join(words)} of it", f"a {words[0]} in the city", f"why is {words[-1]}", f"the {other} of it"]
        made.append(GradedList(f"l{n}", f"how {' '.join(words)} {'long' * (n // len(TOPICS))}".strip(), passages, [3, 2, 1, 0]))
    return made


def write_lists(path: Path, count: int = 16) -> Path:
    rows = [{"id": x.id, "query": x.query, "passages": dict(zip(map(str, x.grades), x.passages, strict=True))} for x in lists(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config(folder: Path, model: Path, **options) -> TrainConfig:  # noqa: ANN003
    settings = {"lists": ["given"], "out": str(folder / "out"), "model": str(model), "batch_size": 4, "lr": 5e-3, "device": "cpu", "epochs": 3}
    return TrainConfig(**{**settings, **options})


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_goes_down_and_the_model_is_saved(loss: str, tiny_llama: Path, tmp_path: Path) -> None:
    record = train(config(tmp_path, tiny_llama, loss=loss, temperature=0.5, epochs=8), lists(), progress=False)
    rows = log(tmp_path / "out")
    assert [row["step"] for row in rows] == list(range(32)) and record["steps"] == 32
    first, last = (sum(row["loss"] for row in part) / 4 for part in (rows[:4], rows[-4:]))
    assert last < 0.8 * first, (first, last)
    before, after = BiEncoder.load(tiny_llama), BiEncoder.load(tmp_path / "out")
    assert not torch.equal(before.encode(["moon tide"]), after.encode(["moon tide"]))
    assert not list(tmp_path.glob("*.partial"))
    saved = json.loads((tmp_path / "out" / "train.json").read_text())
    assert saved["settings"]["loss"] == loss and saved["chosen"]["lr"] == 5e-3 and saved["machine"]["torch"] == torch.__version__


def test_training_ranks_the_grades(tiny_bert: Path, tmp_path: Path) -> None:
    train(config(tmp_path, tiny_bert, order=1, temperature=0.5, label_temperature=0.5, epochs=12), lists(), progress=False)
    encoder, right = BiEncoder.load(tmp_path / "out"), {"before": 0, "after": 0}
    for name, model in (("before", BiEncoder.load(tiny_bert)), ("after", encoder)):
        for item in lists():
            scores = model.encode([item.query], "query") @ model.encode(item.passages).T
            right[name] += int(scores.argmax() == 0)
    assert right["after"] >= 14 > right["before"], right


def test_same_seed_same_losses_other_seed_other_order(tiny_bert: Path, tmp_path: Path) -> None:
    """BERT has dropout, so this also checks that the random state is part of the seed."""
    runs = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(config(tmp_path, tiny_bert, seed=seed, out=str(tmp_path / name)), lists(), progress=False)
        runs[name] = [row["loss"] for row in log(tmp_path / name)]
    assert runs["a"] == runs["b"] != runs["c"]


def test_frozen_run_equals_a_run_that_recomputes(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, room in (("kept", 1.0), ("again", 0.0)):
        train(config(tmp_path, tiny_llama, freeze=2, state_gb=room, out=str(tmp_path / name)), lists(), progress=False)
    assert "computed again in every step" in capsys.readouterr().err
    kept, again = ([row["loss"] for row in log(tmp_path / name)] for name in ("kept", "again"))
    assert kept == pytest.approx(again, abs=1e-4)
    start, end = BiEncoder.load(tiny_llama).model, BiEncoder.load(tmp_path / "kept").model
    assert torch.equal(start.embed_tokens.weight, end.embed_tokens.weight)
    assert torch.equal(start.layers[1].mlp.up_proj.weight, end.layers[1].mlp.up_proj.weight)
    assert not torch.equal(start.layers[2].mlp.up_proj.weight, end.layers[2].mlp.up_proj.weight)


def test_padded_lists_and_chunks_train(tiny_llama: Path, tmp_path: Path) -> None:
    uneven = [replace(item, passages=item.passages[:k], grades=item.grades[:k]) for item, k in zip(lists(), [4, 2, 3, 4] * 4, strict=True)]
    for loss in LOSSES:
        train(config(tmp_path, tiny_llama, loss=loss, epochs=1, out=str(tmp_path / loss)), uneven, progress=False)
        train(config(tmp_path, tiny_llama, loss=loss, chunk=3, epochs=1, out=str(tmp_path / f"{loss}-chunk")), uneven, progress=False)
        one, two = ([row["loss"] for row in log(tmp_path / name)] for name in (loss, f"{loss}-chunk"))
        assert one == pytest.approx(two, abs=1e-4)


SLOW_TRAIN = """
import sys, time
from repro import train
step = train.batch_loss
def slow(*args):
    time.sleep(0.15)
    return step(*args)
train.batch_loss = slow
sys.exit(train.main(sys.argv[1:]))
"""


def test_killed_run_resumes_to_the_same_weights(tiny_bert: Path, tmp_path: Path) -> None:
    data = write_lists(tmp_path / "lists.jsonl")
    options = ["--lists", str(data), "--model", str(tiny_bert), "--batch-size", "4", "--epochs", "4", "--lr", "5e-3",
               "--checkpoint-every", "2", "--device", "cpu"]  # fmt: skip
    assert main([*options, "--out", str(tmp_path / "whole")]) == 0
    command = [sys.executable, "-c", SLOW_TRAIN, *options, "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[1])
    state = tmp_path / "killed.partial" / "state.safetensors"
    deadline = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert state.exists() and not (tmp_path / "killed").exists()
    assert main([*options, "--out", str(tmp_path / "killed")]) == 0
    whole, killed = log(tmp_path / "whole"), log(tmp_path / "killed")
    assert [row["step"] for row in killed] == list(range(16)) and killed == whole
    weights = [BiEncoder.load(tmp_path / name).model.state_dict() for name in ("whole", "killed")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_finished_and_foreign_folders(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first = train(config(tmp_path, tiny_llama), lists(), progress=False)
    assert train(config(tmp_path, tiny_llama), lists(), progress=False) == first
    assert "finished already" in capsys.readouterr().err
    with pytest.raises(RunError, match="seed is 0 there and 1 here"):
        train(config(tmp_path, tiny_llama, seed=1), lists(), progress=False)
    with pytest.raises(RunError, match="lists_sha256"):
        train(config(tmp_path, tiny_llama), lists(15), progress=False)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match="no run of this command"):
        train(config(tmp_path, tiny_llama, out=str(tmp_path / "foreign")), lists(), progress=False)
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match="no run of this command"):
        train(config(tmp_path, tiny_llama, out=str(tmp_path / "mine")), lists(), progress=False)
    for name in ("foreign", "mine.partial"):
        assert (tmp_path / name / "thesis.txt").read_text() == "precious"


def test_bad_settings_are_one_sentence(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for options, error, message in [
        ({"batch_size": 0}, TrainError, "batch_size: expected"),
        ({"loss": "hinge"}, TrainError, "loss: expected one of"),
        ({"freeze": 4}, ValueError, "frozen layers"),
        ({"lr": 1e30}, TrainError, "the loss is nan"),
    ]:
        with pytest.raises(error, match=message):
            train(config(tmp_path, tiny_llama, **options), lists(), progress=False)
    with pytest.raises(TrainError, match="recipe"):
        training_lists(TrainConfig(lists=[str(write_lists(tmp_path / "l.jsonl"))], recipe="mixed"))
    with pytest.raises(DataError, match="expected graded lists, found none"):
        training_lists(TrainConfig(lists=[str(write_lists(tmp_path / "e.jsonl", 0))]))
    assert main(["--lists", str(tmp_path / "missing.jsonl"), "--out", str(tmp_path / "x")]) == 2
    assert main(["--lists", str(tmp_path / "l.jsonl"), "--model", "no-such-model", "--out", str(tmp_path / "x")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "missing.jsonl: cannot be read" in errors[0] and "unknown model 'no-such-model'" in errors[1]
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.partial").exists()


def test_fewer_lists_than_a_batch_is_said(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    record = train(config(tmp_path, tiny_llama, batch_size=64), lists(6), progress=False)
    assert record["chosen"]["batch_size"] == 6 and record["steps"] == 3
    assert "only 6 lists: a batch is 6 of them, not 64" in capsys.readouterr().err


def test_autocast_leaves_pooling_and_scores_in_float32(tiny_bert: Path) -> None:
    encoder = BiEncoder.load(tiny_bert, device="cpu").eval()
    encoder.normalise = True
    seen = []

    def loss(scores: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        seen.append(scores.detach())
        return scores.sum()

    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            batch_loss(encoder, collate(lists(8)), encoder.tokenise, loss)
    exact, mixed = seen
    assert mixed.dtype == torch.float32 and not torch.equal(exact, mixed)  # the transformer did run in bfloat16
    assert not torch.equal(mixed, mixed.bfloat16().float())  # but the scores are not rounded to it
    torch.testing.assert_close(mixed, exact, atol=0.02, rtol=0)


def test_learning_rate_warms_up_and_decays() -> None:
    rates = [learning_rate(step, 100, 1.0, 0.05) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] < 1 and all(a > b for a, b in zip(rates[4:], rates[5:], strict=False)) and 0 < rates[-1] < 0.02
    assert [learning_rate(step, 1, 1.0, 0.05) for step in range(1)] == [1.0]


TWO_RANKS = """
import sys, torch, torch.distributed as dist
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_train import gradients
dist.init_process_group("gloo")
torch.save(gradients(Path(sys.argv[2]), sys.argv[3]), f"{sys.argv[4]}.{dist.get_rank()}")
dist.destroy_process_group()
"""


def gradients(model: Path, loss: str) -> dict[str, torch.Tensor]:
    """Parameter gradients of one batch of 8 uneven lists, on one process or under torchrun."""
    encoder = BiEncoder.load(model, device="cpu").eval()  # no dropout: two ranks draw other masks than one
    wrapped = torch.nn.parallel.DistributedDataParallel(encoder) if torch.distributed.is_initialized() else encoder
    uneven = [replace(item, passages=item.passages[: 3 + n % 2], grades=item.grades[: 3 + n % 2]) for n, item in enumerate(lists(8))]
    value = batch_loss(wrapped, collate(uneven), encoder.tokenise, loss_function(TrainConfig(loss=loss), {"temperature": 0.7, "label_temperature": 1.0}))
    value.backward()
    return {"loss": value.detach(), **{name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}}


def torchrun(*arguments: str) -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]


def test_two_ranks_give_the_gradients_of_one(tiny_bert: Path, tmp_path: Path) -> None:
    loss = "wasserstein_gaussian"  # the one that is wrong unless every rank sees the whole batch
    single = gradients(tiny_bert, loss)
    (tmp_path / "two.py").write_text(TWO_RANKS)
    torchrun(str(tmp_path / "two.py"), str(Path(__file__).parent), str(tiny_bert), loss, str(tmp_path / "grads"))
    for rank in (0, 1):
        found = torch.load(tmp_path / f"grads.{rank}", weights_only=True)
        assert found.keys() == single.keys()
        for name in single:
            torch.testing.assert_close(found[name], single[name], atol=1e-5, rtol=1e-4)


def test_command_under_torchrun_equals_one_process(tiny_llama: Path, tmp_path: Path) -> None:
    options = ["--lists", str(write_lists(tmp_path / "lists.jsonl")), "--model", str(tiny_llama), "--batch-size", "4", "--epochs", "2",
               "--lr", "5e-3", "--device", "cpu", "--checkpoint-every", "3"]  # fmt: skip
    assert main([*options, "--out", str(tmp_path / "one")]) == 0
    torchrun("-m", "repro.train", *options, "--out", str(tmp_path / "two"))
    one, two = ([row["loss"] for row in log(tmp_path / name)] for name in ("one", "two"))
    assert len(two) == 8 and two == pytest.approx(one, abs=1e-4)
    assert json.loads((tmp_path / "two" / "train.json").read_text())["chosen"]["ranks"] == 2


def test_a_projection_trains_alone_unless_layers_are_asked_for(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYCL_CACHE", str(tmp_path / "cache"))
    before = BiEncoder.load(tiny_llama, device="cpu")
    alone = train(config(tmp_path, tiny_llama, projection=True, out=str(tmp_path / "alone")), lists(), progress=False)
    after = BiEncoder.load(tmp_path / "alone", device="cpu")
    assert alone["chosen"]["freeze"] == 4 and not torch.equal(after.projection, torch.eye(16))
    assert all(torch.equal(a, b) for a, b in zip(before.model.parameters(), after.model.parameters(), strict=True))
    again = train(config(tmp_path, tmp_path / "alone", freeze=3, out=str(tmp_path / "upper")), lists(), progress=False)
    upper = BiEncoder.load(tmp_path / "upper", device="cpu")
    assert again["chosen"]["freeze"] == 3 and not torch.equal(upper.projection, after.projection)
    changed = [name for (name, a), b in zip(upper.model.named_parameters(), after.model.parameters(), strict=True) if not torch.equal(a, b)]
    assert changed and all(name.startswith(("layers.3", "norm")) for name in changed)


def test_steps_replace_epochs(tiny_llama: Path, tmp_path: Path) -> None:
    record = train(config(tmp_path, tiny_llama, steps=6, epochs=50), lists(), progress=False)
    assert record["steps"] == 6 and [row["epoch"] for row in log(tmp_path / "out")] == [0, 0, 0, 0, 1, 1]


def test_temperatures_are_chosen_by_the_kind_of_scores(tiny_llama: Path) -> None:
    from repro.recipe import COSINE, chosen_settings

    raw, cosine = BiEncoder.load(tiny_llama, device="cpu"), BiEncoder.load(tiny_llama, device="cpu", normalise=True)
    for loss in LOSSES:
        told = [chosen_settings(TrainConfig(loss=loss), encoder, 32) for encoder in (raw, cosine)]
        assert [(row["temperature"], row["label_temperature"]) for row in told] == [(1.0, 1.0), COSINE[loss]]
    asked = chosen_settings(TrainConfig(loss="kl", temperature=0.7, label_temperature=0.3, epochs=4), cosine, 32)
    assert (asked["temperature"], asked["label_temperature"], asked["steps"]) == (0.7, 0.3, 8)
    with pytest.raises(TrainError, match="loss: expected one of infonce, kl"):
        chosen_settings(TrainConfig(loss="hinge"), cosine, 32)
