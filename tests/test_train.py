"""The training loop: learning, repeating, resuming, refusing, and two ranks against one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import graded_lists, write_jsonl, write_lists
from transformers import AutoConfig, AutoModel

from repro import evaluate
from repro.data import collate
from repro.encoder import BiEncoder
from repro.losses import LOSSES
from repro.train import COSINE, TrainConfig, batch_loss, filled, learning_rate, loss_function, main, train

ROOT = Path(__file__).parents[1]
UNEVEN = [replace(x, passages=x.passages[: 2 + n % 3], grades=x.grades[: 2 + n % 3])
          for n, x in enumerate(graded_lists())]

def run(folder: Path, model: Path, name: str = "out", lists: list | None = None, **options) -> dict:
    settings = {"out": str(folder / name), "model": str(model), "batch_size": 4, "lr": 5e-3, "device": "cpu"}
    return train(TrainConfig(**{**settings, "epochs": 3, **options}), lists or graded_lists(), progress=False)

def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]

def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in log(folder)]

@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_goes_down_and_the_model_is_saved(loss: str, tiny_llama: Path, tmp_path: Path) -> None:
    record = run(tmp_path, tiny_llama, loss=loss, temperature=0.5, epochs=8)
    rows = losses(tmp_path / "out")
    assert len(rows) == record["steps"] == 32 and sum(rows[-4:]) < 0.8 * sum(rows[:4])
    before, after = BiEncoder.load(tiny_llama), BiEncoder.load(tmp_path / "out")
    assert not torch.equal(before.encode(["moon tide"]), after.encode(["moon tide"]))
    saved = json.loads((tmp_path / "out" / "train.json").read_text())
    assert saved["settings"]["loss"] == loss and saved["machine"]["torch"] == torch.__version__
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

def test_training_ranks_the_grades(tiny_bert: Path, tmp_path: Path) -> None:
    run(tmp_path, tiny_bert, temperature=0.5, label_temperature=0.5, epochs=12)
    right = []
    for model in (BiEncoder.load(tiny_bert), BiEncoder.load(tmp_path / "out")):
        ranked = [model.encode([x.query], "query") @ model.encode(x.passages).T for x in graded_lists()]
        right.append(sum(int(scores.argmax() == 0) for scores in ranked))
    assert right[1] >= 14 > right[0], right

def test_same_seed_same_losses_other_seed_other_order(tiny_bert: Path, tmp_path: Path) -> None:
    """BERT has dropout, so this also checks that the random state is part of the seed."""
    for name, seed, warmup in (("a", 1, 0.05), ("b", 1, 0.05), ("c", 2, 0.05), ("d", 1, 1.0)):
        run(tmp_path, tiny_bert, name, seed=seed, warmup=warmup)
    a, b, c, d = (losses(tmp_path / name) for name in "abcd")
    assert a == b != c and d[0] == a[0] and d != a  # the rate follows its schedule

@pytest.mark.parametrize("loss", LOSSES)
def test_padding_chunks_and_accumulation(loss: str, tiny_llama: Path, tmp_path: Path) -> None:
    runs = {"plain": {}, "chunk": {"chunk": 3}, "two": {"accumulate": 2}, "still": {"lr": 1e-30}}
    for name, options in runs.items():
        run(tmp_path, tiny_llama, name, UNEVEN, loss=loss, epochs=1, **options)
    plain, chunk, two, still = (losses(tmp_path / name) for name in runs)
    assert chunk == pytest.approx(plain, abs=1e-4)
    # Two losses of 4 lists make one step: the loss's batch does not grow, their mean is what is logged.
    assert len(two) == 2 and two[0] == pytest.approx(sum(still[:2]) / 2, abs=1e-6)

def test_options_reach_the_loss(tiny_llama: Path) -> None:
    encoder, batch = BiEncoder.load(tiny_llama, device="cpu"), collate(UNEVEN[:8])
    real = batch.mask.flatten()  # padding has no part in the loss
    with torch.no_grad():
        scores = encoder.encode(batch.queries, "query") @ encoder.encode(batch.passages)[real].T
        own = torch.eye(8).repeat_interleave(4, dim=1)[:, real]  # (B, N)
        labels = own * batch.labels.flatten()[real]
        for loss, options in (("wasserstein_1d", {"order": 2, "axis": "gain"}), ("kl", {"target": "own"}),
                              ("infonce", {"ignore_between": True})):
            settings = TrainConfig(loss=loss, temperature=0.7, label_temperature=0.5, **options)
            found = batch_loss(encoder, batch, loss_function(settings), settings.target == "own")
            extra = {"label_temperature": 0.5} if loss != "infonce" else {}
            extra |= {"target_mask": own > 0} if "target" in options else options
            expected = LOSSES[loss](scores, labels, 0.7, **extra)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)

def test_weights_are_averaged_with_the_start(tiny_llama: Path, tmp_path: Path) -> None:
    for name, share in (("all", 1.0), ("half", 0.5), ("none", 0.0)):
        run(tmp_path, tiny_llama, name, average=share)
    folders = (tiny_llama, *(tmp_path / name for name in ("all", "half", "none")))
    start, *rest = [BiEncoder.load(folder).model.norm.weight for folder in folders]
    assert torch.equal(rest[2], start) and not torch.equal(rest[0], start)
    torch.testing.assert_close(rest[1], (start + rest[0]) / 2)

SLOW = """
import sys, time
from repro import train
step = train.batch_loss
train.batch_loss = lambda *args: time.sleep(0.15) or step(*args)
sys.exit(train.main(sys.argv[1:]))
"""

def test_killed_run_goes_on_to_the_same_weights_and_has_a_lock(tiny_bert: Path, tmp_path: Path) -> None:
    options = ["--lists", str(write_lists(tmp_path / "lists.jsonl")), "--model", str(tiny_bert)]
    options += "--batch-size 4 --epochs 4 --lr 5e-3 --checkpoint-every 2 --device cpu".split()
    assert main([*options, "--out", str(tmp_path / "whole")]) == 0
    command = [sys.executable, "-c", SLOW, *options, "--out", f"{tmp_path}/killed/"]  # a slash does no harm
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=ROOT)
    state = tmp_path / "killed.partial" / "state.safetensors"
    deadline = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert main([*options, "--out", str(tmp_path / "killed")]) == 2  # another process is at it
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert state.exists() and not (tmp_path / "killed").exists()
    assert main([*options, "--out", str(tmp_path / "killed")]) == 0
    assert log(tmp_path / "killed") == log(tmp_path / "whole") and len(log(tmp_path / "whole")) == 16
    weights = [BiEncoder.load(tmp_path / name).model.state_dict() for name in ("whole", "killed")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert {p.name for p in tmp_path.iterdir() if p.name[0] != "."} == {"killed", "lists.jsonl", "whole"}

def test_finished_and_foreign_folder(tiny_llama: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    renamed, rename = [], os.rename
    monkeypatch.setattr(Path, "rename", lambda a, b: renamed.append({*os.listdir(a)}) or rename(a, b))
    assert run(tmp_path, tiny_llama) == run(tmp_path, tiny_llama)
    assert renamed[-1] >= {"model.safetensors", "log.jsonl", "train.json"}  # the last step has all
    assert "finished already" in capsys.readouterr().err
    for name in ("foreign", "mine.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for options, message in [({"seed": 1}, "seed is 0 there and 1 here"), ({"name": "link"}, "symlink"),
            ({"name": "foreign"}, "not empty"), ({"name": "mine"}, "no run of this command"),
            ({"out": "."}, "working folder"), ({"name": "new", "freeze": 9}, "freeze: expected"),
            ({"name": "new", "accumulate": 99}, "steps: expected a number of 1 or more, got 0")]:
        with pytest.raises(ValueError, match=message):
            run(tmp_path, tiny_llama, **options)
    with pytest.raises(ValueError, match="lists_sha256"):
        run(tmp_path, tiny_llama, lists=graded_lists(15))
    run(tmp_path, tiny_llama, name="new", freeze=0)  # of the refused run nothing was kept
    assert [f.read_text() for f in tmp_path.glob("*/thesis.txt")] == ["precious"] * 2

BAD = "--lr 0|--lr inf|--lr nan|--epochs 0|--steps 0|--steps -5|--temperature 0|--label-temperature -1"
BAD += "|--batch-size 0|--clip -1|--warmup nan|--warmup 2|--average 1.5|--checkpoint-every 0|--chunk 0"
BAD += "|--accumulate 0|--freeze -1|--dtype int32|--order 3|--axis line|--loss hinge|--target none|--seed -1"
BAD += "|--seed 9999999999|--negatives x|--recipe mixed|--recipe real|--model no|--lists gone.gz|--device x"

@pytest.mark.parametrize("options", BAD.split("|"))
def test_bad_settings(options: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_lists(tmp_path / "lists.jsonl")
    assert main(["--lists", "lists.jsonl", "--model", "no-model", "--out", "new/x", *options.split()]) == 2
    name, errors = options.split()[0].strip("-").replace("-", "_"), capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ")
    assert "no-model" not in errors[0] and (name in errors[0] or options.split()[-1] in errors[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lists.jsonl"]

def test_not_a_number_is_an_error(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"step \d: the loss is nan"):
        run(tmp_path, tiny_llama, "a", lr=1e30)
    with pytest.raises(ValueError, match="a trained weight is not a finite number"):
        run(tmp_path, tiny_llama, lr=1e20, weight_decay=1e20, steps=1)

def test_defaults(tiny_llama: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    raw, cosine = BiEncoder.load(tiny_llama, device="cpu"), BiEncoder.load(tiny_llama, device="cpu")
    cosine.normalise, cosine.projection = True, torch.nn.Parameter(torch.eye(16))
    for loss in LOSSES:
        for encoder, expected in ((raw, (1.0, 1.0, 1e-5, 1)), (cosine, (*COSINE[loss], 4e-4, 5))):
            found = filled(TrainConfig(loss=loss), encoder, 32)
            assert (found.temperature, found.label_temperature, found.lr, found.steps // 2) == expected
    assert filled(TrainConfig(temperature=0.7, epochs=4), cosine, 32).steps == 8
    cosine.save(tmp_path / "mapped")
    settings = TrainConfig(model=str(tmp_path / "mapped"), out=str(tmp_path / "out"), device="cpu")
    record = train(settings, graded_lists(6), progress=False)
    assert record["chosen"]["lr"] == 4e-4 and record["chosen"]["batch_size"] == 6 and record["steps"] == 5
    assert "only 6 lists: a batch is 6 of them, not 16" in capsys.readouterr().err
    after = BiEncoder.load(tmp_path / "out", device="cpu")
    assert not torch.equal(after.projection, cosine.projection)
    assert all(torch.equal(a, after.model.get_parameter(n)) for n, a in raw.model.named_parameters())

def test_defaults_for_cosines_are_those_of_the_best_trials() -> None:
    table = json.loads((ROOT / "repro" / "experiment" / "results" / "tuning.json").read_text())["base"]
    arms = dict(zip(LOSSES, ("InfoNCE, all lower", "KL", "1-D W", "Gaussian W2"), strict=True))
    usual = {key: getattr(TrainConfig(), key) for key in ("target", "order", "axis")}
    for loss, arm in arms.items():
        rows = [row for row in table[arm]["trials"] if all(row.get(k, v) == v for k, v in usual.items())]
        best = max(rows, key=lambda row: row["ndcg@10"])
        assert COSINE[loss] == (best["temperature"], best.get("label_temperature", 1.0))

def test_autocast_leaves_pooling_and_scores_in_float32(tiny_bert: Path) -> None:
    encoder, seen = BiEncoder.load(tiny_bert, device="cpu").eval(), []
    encoder.normalise = True
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            batch_loss(encoder, collate(graded_lists(8)), lambda s, labels, mask: seen.append(s.detach()))
    exact, mixed = seen
    assert mixed.dtype == torch.float32 and not torch.equal(exact, mixed)  # the transformer ran in bfloat16
    assert not torch.equal(mixed, mixed.bfloat16().float())  # but the scores are not rounded to it
    torch.testing.assert_close(mixed, exact, atol=0.02, rtol=0)

def test_learning_rate_warms_up_and_decays() -> None:
    rates = [learning_rate(step, TrainConfig(lr=1.0, steps=100)) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a > b for a, b in zip(rates[4:], rates[5:], strict=False)) and 0 < rates[-1] < 0.02
    assert learning_rate(0, TrainConfig(lr=1.0, steps=1)) == 1.0

TWO_RANKS = """
import sys, torch, torch.distributed as dist
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_train import gradients
dist.init_process_group("gloo")
torch.save(gradients(Path(sys.argv[2])), f"{sys.argv[3]}.{dist.get_rank()}")
"""

def gradients(model: Path) -> dict[str, torch.Tensor]:
    """Loss and parameter gradients of one batch of 8 uneven lists, on one process or under torchrun."""
    encoder = BiEncoder.load(model, device="cpu").eval()  # no dropout: two ranks draw other masks than one
    several = torch.distributed.is_initialized()
    wrapped = torch.nn.parallel.DistributedDataParallel(encoder) if several else encoder
    # The loss that is wrong unless every rank sees the whole batch.
    settings = TrainConfig(loss="wasserstein_gaussian", temperature=0.7, label_temperature=1.0)
    value = batch_loss(wrapped, collate(UNEVEN[:8]), loss_function(settings))
    value.backward()
    named = encoder.named_parameters()
    return {"loss": value.detach(), **{n: p.grad for n, p in named if p.grad is not None}}

def torchrun(*arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *arguments], capture_output=True, timeout=300, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return (done.stdout + done.stderr).decode()

def test_two_ranks_give_the_gradients_of_one(tiny_bert: Path, tmp_path: Path) -> None:
    single = gradients(tiny_bert)
    (tmp_path / "two.py").write_text(TWO_RANKS)
    torchrun(str(tmp_path / "two.py"), str(Path(__file__).parent), str(tiny_bert), str(tmp_path / "grads"))
    for rank in (0, 1):
        found = torch.load(tmp_path / f"grads.{rank}", weights_only=True)
        assert found.keys() == single.keys()
        for name in single:
            torch.testing.assert_close(found[name], single[name], atol=1e-5, rtol=0)

def test_command_under_torchrun_equals_one_process(tiny_bert: Path, tmp_path: Path) -> None:
    unused = {"is_decoder": True, "add_cross_attention": True}  # parameters that no text reaches
    unused |= {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}  # which ranks would draw apart
    config = AutoConfig.from_pretrained(tiny_bert, **unused)
    AutoModel.from_config(config).save_pretrained(shutil.copytree(tiny_bert, tmp_path / "bert"))
    options = ["--lists", str(write_lists(tmp_path / "lists.jsonl")), "--model", f"{tmp_path}/bert"]
    options += "--batch-size 4 --epochs 2 --lr 5e-3 --checkpoint-every 3 --device cpu --accumulate 2".split()
    assert main([*options, "--out", str(tmp_path / "one")]) == 0
    torchrun("-m", "repro.train", *options, "--chunk", "4", "--out", str(tmp_path / "two"))
    assert len(losses(tmp_path / "two")) == 4 and losses(tmp_path / "two") == pytest.approx(
        losses(tmp_path / "one"), abs=1e-4)
    assert json.loads((tmp_path / "two" / "train.json").read_text())["ranks"] == 2

def test_two_ranks_share_the_encoding(tiny_bert: Path, tmp_path: Path) -> None:
    options = f"--model {tiny_bert} --device cpu --dtype float32 --run".split()
    assert evaluate.main([*options, f"{tmp_path}/1"]) == 0
    shown = torchrun("-m", "--", "repro.evaluate", *options, f"{tmp_path}/2")
    one, two = ([float(line.split()[4]) for line in (tmp_path / name).open()] for name in "12")
    assert one == pytest.approx(two, abs=1e-5) and "/151" in shown and shown.count("ndcg@10") == 1

def test_four_released_experiments(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's own lines, in a folder that has the released layout under the names of the hub."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_bert, "facebook/contriever")
    lists, sycl, real = graded_lists(128), Path("BatsResearch/sycl"), Path("mteb/msmarco")
    rows = [(x.id, f"{x.id}-{y}", y, t) for x in lists for y, t in zip(x.grades, x.passages, strict=True)]
    for place, judged in ((sycl / "llama33_70b", (3, 2, 1, 0)), (real, (3,))):
        (place / "qrels").mkdir(parents=True)
        table = [f"{query}\t{passage}\t{y}\n" for query, passage, y, _ in rows if y in judged]
        (place / "qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(table))
        write_jsonl(place / "corpus.jsonl", [{"_id": key, "title": "", "text": t} for _, key, _, t in rows])
    write_jsonl(real / "queries.jsonl", [{"_id": x.id, "text": x.query} for x in lists])
    (sycl / "real_data/bm25_top_docs").mkdir(parents=True)
    mined = [{"qid": x.id, "docid": [f"{x.id}-{y}" for y in (3, 2, 1, 0)]} for x in lists]
    write_jsonl(sycl / "real_data/bm25_top_docs/train_qrels.jsonl", mined)
    names, found = {}, {}
    block = re.search(r"```bash\n(export RUN=.*?)```", (ROOT / "README.md").read_text(), re.S)
    for line in block[1].splitlines():
        name, _, value = line.removeprefix("export ").partition("=")
        line = re.sub(r"\$(\w+)", lambda match: names[match[1]], line)
        if line.startswith("export"):
            names[name] = value.strip('"')
        else:
            options = line.partition(" -m repro.train ")[2].split()
            assert main([*options, "--steps", "2", "--device", "cpu"]) == 0
            record = json.loads(Path(options[-1], "train.json").read_text())
            found[options[-1]] = record["settings"]["loss"], record["queries"], record["steps"]
    assert [*found.values()] == [("infonce", 128, 2)] * 2 + [("wasserstein_gaussian", 128, 2)] * 2
