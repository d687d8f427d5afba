"""Training: the loop, its records, what it refuses, two ranks against one, the command."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import graded_lists, write_jsonl, write_lists
from torch.testing import assert_close

from repro.data import as_collection, collate
from repro.encoder import BiEncoder
from repro.losses import LOSSES
from repro.train import (
    TrainConfig,
    batch_loss,
    epoch_order,
    filled,
    fit,
    learning_rate,
    loss_function,
    main,
    train_encoder,
)

SMALL = {"batch_size": 4, "steps": 2, "temperature": 1, "lr": 5e-3, "device": "cpu"}


def trained(model, **options):
    """A short run in memory: the encoder and the losses."""
    encoder = BiEncoder.load(model, "cpu")
    config = TrainConfig(**SMALL | options)
    _, rows, _ = train_encoder(encoder, graded_lists(), config)
    return encoder, [row["loss"] for row in rows]


@pytest.fixture
def arguments(tiny_bert, tmp_path, monkeypatch):
    """What the command takes, in a folder with two files of lists, of four and of two passages."""
    monkeypatch.chdir(tmp_path)
    write_lists(Path("lists.jsonl"))
    pairs = [{"query": text, "passages": {"3": "tea", "0": "coffee"}} for text in ("tea", "bread")]
    write_jsonl(Path("pairs.jsonl"), pairs)
    line = f"--model {tiny_bert} --out out --batch-size 6 --device cpu --lr 5e-3"
    return ["--lists", "lists.jsonl", "pairs.jsonl", *line.split()]


def read_record(folder="out"):
    return json.loads(Path(folder, "train.json").read_text())


def read_log(folder="out"):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_goes_down(loss, tiny_llama):
    _, losses = trained(tiny_llama, loss=loss, steps=12, temperature=0.5)
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_the_learning_rate_rises_and_falls_linearly():
    config = TrainConfig(lr=1.0, steps=5, warmup=0.4)
    found = [learning_rate(step, config) for step in range(5)]
    assert found == pytest.approx([0.5, 1, 0.75, 0.5, 0.25])


def test_an_epoch_visits_every_list_once_in_an_order_of_its_own(tiny_llama):
    seen = []
    encoder = BiEncoder.load(tiny_llama, "cpu")
    encoder.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    config = TrainConfig(**SMALL | {"steps": 8})
    train_encoder(encoder, graded_lists(), config)
    queries = sorted(item.query for item in graded_lists())
    assert sorted(seen[:16]) == queries
    assert sorted(seen[16:]) == queries
    assert seen[:16] != seen[16:]


@pytest.mark.parametrize("dropout", [0, 0.1])
def test_the_same_seed_gives_the_same_losses_and_another_seed_others(dropout, tiny_bert):
    losses = [trained(tiny_bert, seed=seed, dropout=dropout)[1] for seed in (1, 1, 2)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.parametrize(("options", "same"), [({}, True), ({"dropout": 0.1}, False)])
def test_without_dropout_the_forward_pass_in_training_is_deterministic(options, same, tiny_bert):
    encoder, _ = trained(tiny_bert, **options)
    encoder.train()
    once, again = [encoder.embed(["moon tide"], "query") for _ in range(2)]
    assert torch.equal(once, again) == same


def test_embedding_in_chunks_changes_nothing(tiny_llama):
    losses = [trained(tiny_llama, chunk=chunk)[1] for chunk in (None, 3)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_gradients_of_accumulated_losses_are_averaged(tiny_llama):
    encoder = BiEncoder.load(tiny_llama, "cpu")
    weights = encoder.trainable()
    config = TrainConfig(**SMALL, accumulate=2)
    lists = [graded_lists(8)[j] for j in epoch_order(8, 0, 0)]
    losses = []
    for half in (lists[:4], lists[4:]):
        losses.append(batch_loss(encoder, collate(half), loss_function(config)))
    gradients = torch.autograd.grad(sum(losses) / 2, weights)
    row = next(fit(encoder, graded_lists(8), config, torch.optim.AdamW(weights)))
    norm = torch.nn.utils.get_total_norm(gradients)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


OPTIONS = [
    ("infonce", {"temperature": 2}),
    ("kl", {"temperature": 2, "label_temperature": 3}),
    ("wasserstein-1d", {"temperature": 2, "label_temperature": 3, "ties": "merged"}),
]


@pytest.mark.parametrize(("loss", "options"), OPTIONS)
def test_settings_reach_the_loss(loss, options):
    config = TrainConfig(loss=loss, temperature=2, label_temperature=3, ties="merged")
    assert loss_function(config).keywords == options


def test_a_linear_map_trains_longer_at_a_higher_rate(tiny_llama):
    encoder = BiEncoder.load(tiny_llama, "cpu")
    mapped = BiEncoder(encoder.model, encoder.tokenizer, projection=torch.eye(16))
    config, rows, _ = train_encoder(mapped, graded_lists(), TrainConfig(batch_size=4))
    assert (config.lr, len(rows)) == (4e-4, 20)
    assert not torch.equal(mapped.projection, torch.eye(16))


def test_with_few_lists_a_batch_is_smaller_and_this_is_said(tiny_llama, capsys):
    config = filled(TrainConfig(), BiEncoder.load(tiny_llama, "cpu"), 6)
    assert (config.batch_size, config.steps, config.lr) == (6, 1, 1e-5)
    assert capsys.readouterr().err == "only 6 lists: a batch is 6 of them\n"


@pytest.mark.parametrize(("ranks", "accumulate"), [(3, 1), (1, 2)])
def test_settings_that_leave_no_step_are_refused(ranks, accumulate, tiny_llama):
    encoder = BiEncoder.load(tiny_llama, "cpu")
    with pytest.raises(ValueError, match="^batch_size: |^accumulate: "):
        filled(TrainConfig(accumulate=accumulate), encoder, 16, ranks)


def test_a_temperature_that_is_not_given_is_fitted_and_told(arguments, capsys):
    assert main(arguments) == 0
    found = read_record()["settings"]["temperature"]
    assert f"temperature {found:.4g}, fitted" in capsys.readouterr().err


def test_the_record_and_the_log_say_what_was_done(arguments):
    assert main([*arguments, "--temperature", "0.7"]) == 0
    record = read_record()
    assert record["settings"]["temperature"] == 0.7
    assert [record[key] for key in ("queries", "steps", "ranks")] == [18, 3, 1]
    assert record["machine"]["torch"] == torch.__version__
    assert [row["step"] for row in read_log()] == [0, 1, 2]
    assert {*read_log()[0]} == {"step", "epoch", "loss", "lr", "grad_norm"}


def test_two_ranks_equal_one_process(arguments, monkeypatch):
    arguments += ["--loss", "wasserstein_gaussian", "--epochs", "2", "--accumulate", "2"]
    assert main(arguments) == 0
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command = [*torchrun, "-m", "repro.train", *arguments, "--chunk", "4", "--out", "two"]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert read_record("two")["ranks"] == 2
    one, two = [BiEncoder.load(folder).encode(["moon tide"]) for folder in ("out", "two")]
    assert_close(two, one, atol=1e-5, rtol=0)


def test_prompts_are_trained_with_and_saved(arguments):
    assert main([*arguments, "--query-prompt", "how ", "--passage-prompt", "the "]) == 0
    assert BiEncoder.load("out").prompts == {"query": "how ", "passage": "the "}


def test_a_folder_that_exists_is_refused_before_any_work(arguments, capsys):
    Path("out").mkdir()
    write_lists(Path("out/mine.jsonl"))
    assert main([*arguments, "--overwrite", "--model", "nowhere"]) == 2
    assert "out: exists" in capsys.readouterr().err
    assert Path("out/mine.jsonl").exists()


def test_a_model_of_this_command_is_replaced_only_if_asked(arguments):
    codes = [main([*arguments, *more]) for more in ([], [], ["--overwrite", "--seed", "7"])]
    assert codes == [0, 2, 0]
    assert read_record()["settings"]["seed"] == 7


ERRORS = [
    (["--lr", "1e30"], "the loss is nan"),
    (["--model", "nowhere"], "nowhere"),
    (["--lists", "gone.jsonl"], "gone.jsonl"),
    (["--device", "abacus"], "abacus"),
]


@pytest.mark.parametrize(("options", "word"), ERRORS)
def test_after_an_error_nothing_is_left(options, word, arguments, capsys):
    assert main([*arguments, *options]) == 2
    assert word in capsys.readouterr().err
    assert sorted(os.listdir()) == ["lists.jsonl", "pairs.jsonl"]


BAD = [
    ("lr", 0),
    ("lr", math.inf),
    ("temperature", 0),
    ("label_temperature", -1),
    ("clip", math.nan),
    ("epochs", 0),
    ("steps", -5),
    ("batch_size", 0),
    ("accumulate", 0),
    ("chunk", 0),
    ("warmup", 2),
    ("dropout", -0.1),
    ("weight_decay", -1),
    ("seed", -1),
    ("loss", "hinge"),
    ("ties", "even"),
    ("dtype", "int32"),
    ("recipe", "mixed"),
    ("recipe", "real"),
    ("negatives", "x"),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_setting_is_named(name, value):
    with pytest.raises(ValueError, match=name):
        TrainConfig(**{name: value})


MINED = "BatsResearch/sycl/real_data/bm25_top_docs/train_qrels.jsonl"
REAL = ["--real", "mteb/msmarco", "--negatives", MINED]
LISTS = ["--lists", "BatsResearch/sycl/llama33_70b", "--queries", "mteb/msmarco"]
RELEASED = [
    ["--recipe", "real", *REAL, "--loss", "infonce"],
    ["--recipe", "binary", *LISTS, "--loss", "infonce"],
    [*LISTS, "--loss", "wasserstein_gaussian"],
    [*LISTS, *REAL, "--loss", "wasserstein_gaussian"],
]


@pytest.mark.parametrize("options", RELEASED)
def test_a_released_experiment_takes_its_first_steps(options, tiny_bert, tmp_path, monkeypatch):
    """In a folder that has the released layout under the names of the hub."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_bert, "facebook/contriever")
    corpus, queries, qrels = as_collection(graded_lists(8))
    folder = Path("mteb/msmarco")
    (folder / "qrels").mkdir(parents=True)
    with open(folder / "qrels/train.tsv", "w") as file:
        for query, judged in qrels.items():
            file.writelines(f"{query}\t{key}\t{grade}\n" for key, grade in judged.items())
    for name, texts in (("corpus", corpus), ("queries", queries)):
        rows = [{"_id": key, "text": text} for key, text in texts.items()]
        write_jsonl(folder / f"{name}.jsonl", rows)
    shutil.copytree(folder, "BatsResearch/sycl/llama33_70b")
    Path(MINED).parent.mkdir(parents=True)
    write_jsonl(Path(MINED), [{"qid": key, "docid": list(corpus)} for key in queries])
    usual = (
        "--model facebook/contriever --batch-size 64 --accumulate 4 --epochs 1 --lr 1e-5 "
        "--warmup 0.05 --temperature 1 --steps 2 --out out"
    )
    assert main([*usual.split(), *options]) == 0
    assert len(read_log()) == 2
