"""Training: the loop, its records, what it refuses, two ranks against one, the command."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from string import Template

import pytest
import torch
from conftest import assert_close, graded_lists, write_jsonl, write_lists
from test_data import write_collection

from repro import train
from repro.data import collate
from repro.encoder import BiEncoder
from repro.losses import LOSSES
from repro.train import TrainConfig, filled, loss_function, main, train_encoder

SMALL = {"batch_size": 4, "steps": 2, "temperature": 1, "lr": 5e-3, "device": "cpu"}


def losses(encoder, **options):
    """Those of a short run in memory."""
    _, rows, _ = train_encoder(encoder, graded_lists(), TrainConfig(**SMALL | options))
    return [row["loss"] for row in rows]


@pytest.fixture
def arguments(tiny_bert, tmp_path, monkeypatch):
    """What the command takes, in a folder with two files of lists, of four and of two passages."""
    monkeypatch.chdir(tmp_path)
    write_lists(Path("lists.jsonl"))
    pair = '{"query": "tea", "passages": {"3": "tea", "0": "coffee"}}\n'
    write_jsonl(Path("pairs.jsonl"), pair + pair.replace("tea", "bread"))
    line = f"--model {tiny_bert} --out out --batch-size 6 --device cpu --lr 5e-3"
    return ["--lists", "lists.jsonl", "pairs.jsonl", *line.split()]


def read_record(folder="out"):
    return json.loads(Path(folder, "train.json").read_text())


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_goes_down(loss, llama):
    found = losses(llama, loss=loss, steps=12, temperature=0.5)
    assert sum(found[-4:]) < 0.9 * sum(found[:4])


def test_the_learning_rate_rises_and_falls_linearly():
    config = TrainConfig(lr=1.0, steps=5, warmup=0.4)
    found = [train.learning_rate(step, config) for step in range(5)]
    assert found == pytest.approx([0.5, 1, 0.75, 0.5, 0.25])


def test_an_epoch_visits_every_list_once_in_an_order_of_its_own(llama):
    seen = []
    llama.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    losses(llama, epochs=2, steps=None)
    assert len({*seen}) == 16
    assert sorted(seen[:16]) == sorted(seen[16:])
    assert seen[:16] != seen[16:]


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(tiny_bert):
    one, again, other = [
        losses(BiEncoder.load(tiny_bert, "cpu"), seed=seed, dropout=True) for seed in (1, 1, 2)
    ]
    assert one == again
    assert one != other


def test_there_is_dropout_only_if_asked_for(tiny_bert):
    config = TrainConfig(**SMALL)
    batch = next(train.batches(graded_lists(), config, 0))
    for dropout in (False, True):
        encoder = BiEncoder.load(tiny_bert, "cpu")
        scores, labels, _ = train.score_batch(encoder, batch)
        without = pytest.approx(loss_function(config)(scores, labels).item())
        first, _ = losses(encoder, dropout=dropout)
        assert (first != without) == dropout


def test_the_gradients_of_accumulated_losses_are_averaged(llama):
    config = TrainConfig(**SMALL, accumulate=2)
    total = 0
    for batch in train.batches(graded_lists(8), config, 0):
        scores, labels, _ = train.score_batch(llama, batch)
        total += loss_function(config)(scores, labels)
    gradients = torch.autograd.grad(total / 2, list(llama.parameters()))
    row = next(train.fit(llama, graded_lists(8), config))
    norm = torch.nn.utils.get_total_norm(gradients)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_settings_reach_the_loss():
    options = {"temperature": 2, "label_temperature": 3, "ties": "merged"}
    assert loss_function(TrainConfig(loss="wasserstein_1d", **options)).keywords == options
    assert loss_function(TrainConfig(loss="infonce", temperature=2)).keywords == {"temperature": 2}


def test_a_linear_map_trains_longer_at_a_higher_rate(llama):
    mapped = BiEncoder(llama.model, llama.tokenizer, projection=torch.eye(16))
    config, rows, _ = train_encoder(
        mapped, graded_lists(), TrainConfig(batch_size=4, dtype="bfloat16")
    )
    assert (config.lr, len(rows), config.dtype) == (4e-4, 20, "float32")
    assert not mapped.projection.equal(torch.eye(16))


@pytest.mark.parametrize("ranks, size", [(1, 6), (4, 4)])
def test_with_few_lists_a_batch_is_smaller_and_this_is_said(
    ranks, size, llama, monkeypatch, capsys
):
    monkeypatch.setattr(train, "RANKS", ranks)
    config = filled(TrainConfig(), llama, 6)
    assert (config.batch_size, config.steps, config.lr) == (size, 1, 1e-5)
    assert capsys.readouterr().err == f"6 lists: a batch is {size} of them\n"


def test_settings_that_leave_no_step_are_refused(llama):
    with pytest.raises(ValueError, match="^16 lists: too few for a step"):
        filled(TrainConfig(accumulate=2), llama, 16)


def test_the_command_says_and_records_what_it_did(arguments, capsys):
    assert main(arguments) == 0
    record = read_record()
    fitted = record["settings"]["temperature"]
    assert f"temperature {fitted:g}" in capsys.readouterr().out
    assert record["settings"]["steps"] == 3
    assert [record[key] for key in ("queries", "ranks")] == [18, 1]
    rows = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert {*rows[0]} == {"step", "loss", "lr", "grad_norm"}


def test_two_ranks_with_gradient_caching_equal_one_process_without(arguments, monkeypatch):
    arguments += ["--loss", "wasserstein_gaussian", "--epochs", "2", "--accumulate", "2"]
    assert main(arguments) == 0
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    torchrun = "-m torch.distributed.run --nproc-per-node=2 --standalone -m repro.train"
    more = ["--chunk", "4", "--out", "two"]
    subprocess.run([sys.executable, *torchrun.split(), *arguments, *more], check=True)
    assert read_record("two")["ranks"] == 2
    one, two = [BiEncoder.load(folder).encode(["moon tide"]) for folder in ("out", "two")]
    assert_close(two, one)


def test_a_rank_that_has_only_padding_takes_part(tiny_bert, monkeypatch):
    for name, value in {"RANK": 3, "RANKS": 4, "all_gather": lambda own: [own] * 4}.items():
        monkeypatch.setattr(train, name, value)
    lists = [replace(item, passages=item.passages[:1], grades=[3]) for item in graded_lists(4)]
    lists[0] = replace(lists[0], passages=["a", "b"], grades=[3, 0])  # its second is rank 1's
    scores, _, _ = train.score_batch(BiEncoder.load(tiny_bert, "cpu"), collate(lists))
    assert scores.shape == (4, 8)


def test_prompts_are_trained_with_and_saved(arguments):
    assert main(arguments) == 0
    without = read_record()["settings"]["temperature"]
    prompts = ["--query-prompt", "how ", "--passage-prompt", "the ", "--overwrite"]
    assert main([*arguments, *prompts]) == 0
    assert read_record()["settings"]["temperature"] != without
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
    ("--lr=1e30", "step 1: the loss or its gradient is not finite"),
    ("--model=nowhere", "nowhere"),
    ("--lists=gone.jsonl", "gone.jsonl"),
    ("--device=abacus", "abacus"),
    ("--loss=hinge", "loss: expected infonce or kl"),
]


@pytest.mark.parametrize("option, word", ERRORS)
def test_after_an_error_nothing_is_left(option, word, arguments, capsys):
    assert main([*arguments, option]) == 2
    assert word in capsys.readouterr().err
    assert sorted(os.listdir()) == ["lists.jsonl", "pairs.jsonl"]


BAD = [
    ("lr", math.inf),
    ("temperature", 0),
    ("clip", math.nan),
    ("steps", -5),
    ("warmup", 2),
    ("seed", -1),
    ("ties", "even"),
    ("dtype", "int32"),
    ("recipe", "real"),
    ("negatives", "x"),
]


@pytest.mark.parametrize("name, value", BAD)
def test_a_bad_setting_is_named(name, value):
    with pytest.raises(ValueError, match=name):
        TrainConfig(**{name: value})


def test_infonce_has_no_label_temperature():
    with pytest.raises(ValueError, match="label_temperature"):
        TrainConfig(loss="infonce", label_temperature=2)


README = Path(__file__).parents[1].joinpath("README.md").read_text("utf-8")
EXPORTS = dict(re.findall('export (.*)="(.*)"', README))
GRADES = "q1 p1 3\nq1 p2 2\nq1 p3 1\nq1 4 0\nq2 p2 3\nq2 p3 2\nq2 p1 1\nq2 4 0\n"
NEGATIVES = """
{"qid": "q1", "docid": ["p1", "4", "p2"]}
{"qid": "q2", "docid": ["p1", "4", "p2"]}
"""


@pytest.mark.parametrize("command", re.findall(r"(?m)^\$RUN .*", README))
def test_a_released_experiment_takes_its_first_steps(command, tiny_bert, tmp_path, monkeypatch):
    """README's own lines, in a folder that has the released layout under the names of the hub."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_bert, "facebook/contriever")
    qrels = GRADES.replace(" ", "\t")
    _, real, _, mined = EXPORTS["REAL"].split()
    folder = write_collection(Path(real), "train", qrels=qrels)
    shutil.copytree(folder, "BatsResearch/sycl/llama33_70b")
    write_jsonl(Path(mined), NEGATIVES)
    options = Template(command).substitute(EXPORTS).split("repro.train ")[1].split()
    assert main([*options, "--steps", "2", "--out", "out"]) == 0
    assert read_record()["settings"]["steps"] == 2
