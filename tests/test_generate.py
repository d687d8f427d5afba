"""Generation runs: records, retries, resume after kills, shards, full disk, the built-in model."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_lm import FINE, LOOSE, QUERIES, Scripted, make_model, options

from repro import cache, prompts
from repro import generate as generate_module
from repro.generate import GenerateError, Sampling, generate, load_generator, main
from repro.likelihood import agreement, query_likelihood
from repro.lists import load_lists


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("lm") / "tiny-lm")


@pytest.fixture(scope="module")
def generator(tiny):
    torch.set_num_threads(1)
    return load_generator(str(tiny), device="cpu")


@pytest.fixture(scope="module")
def query_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("queries") / "queries.jsonl"
    path.write_text(
        "".join(json.dumps({"_id": k, "text": q}) + "\n" for k, q in QUERIES.items()), encoding="utf-8"
    )
    return path


def test_records_do_not_depend_on_batch_size_order_or_company(generator):
    whole = generate(QUERIES, generator, seed=3, sampling=LOOSE, retries=1)
    assert [record["id"] for record in whole] == list(QUERIES)
    assert {record["passages"] is None for record in whole} == {True, False}, (
        "the tiny model should fail now and then"
    )
    generator.batch_size = 4
    backwards = dict(reversed(QUERIES.items()))
    again = generate(backwards, generator, seed=3, sampling=LOOSE, retries=1, pool=list(QUERIES.values()))
    some = generate(
        dict(list(QUERIES.items())[5:9]),
        generator,
        seed=3,
        sampling=LOOSE,
        retries=1,
        pool=list(QUERIES.values()),
    )
    generator.batch_size = None
    assert sorted(again, key=lambda r: r["id"]) == whole and some == whole[5:9]
    other = generate(QUERIES, generator, seed=4, sampling=LOOSE)
    assert all(a["reply"] != b["reply"] for a, b in zip(whole, other, strict=True))


@pytest.mark.parametrize("plan", prompts.PLANS)
@pytest.mark.parametrize("levels", [2, 4])
def test_every_plan_runs(generator, plan, levels):
    records = generate(
        ["word1 word2", "word3"], generator, plan=plan, levels=levels, example=True, sampling=LOOSE
    )
    for record in records:
        assert list(record) == list(cache.FIELDS)
        assert record["parameters"]["levels"] == list(range(levels - 1, -1, -1))
        assert (record["passages"] is None) == (record["error"] is not None)
        assert isinstance(record["reply"], str if plan == "all-levels" else list)
        assert len(record["parameters"]["drawn"]) == (0 if plan == "all-levels" else 2)


def test_failed_replies_are_recorded_and_asked_again(tmp_path):
    """Query b works at the third try, c never; other attempts are not repeated by another run."""

    def answer(key):
        _, query, attempt, _ = key.split("|")
        return FINE if query == "a" or (query == "b" and attempt == "2") else '{"3": "only one"'

    out = tmp_path / "x.jsonl"
    queries = {"a": "one", "b": "two", "c": "three"}
    model = Scripted(answer)
    best = generate(queries, model, plan="all-levels", seed=7, retries=2, out=out)
    assert [record["passages"] is None for record in best] == [False, False, True]
    assert (
        best[2]["error"] == "levels 2, 1, 0 missing (found 1 of 4)" and best[2]["reply"] == '{"3": "only one"'
    )
    tries = [(record["id"], record["attempt"]) for record in cache.read_records(out)]
    assert sorted(tries) == [("a", 0), ("b", 0), ("b", 1), ("b", 2), ("c", 0), ("c", 1), ("c", 2)]
    before = out.read_bytes()
    model.asked.clear()
    assert generate(queries, model, plan="all-levels", seed=7, retries=2, out=out) == best
    assert model.asked == [] and out.read_bytes() == before
    generate(queries, model, plan="all-levels", seed=7, retries=3, out=out)
    assert [key.split("|")[1:3] for keys in model.asked for key in keys] == [["c", "3"]]
    assert len(load_lists([out])) == 2


def test_by_level_stops_asking_after_a_bad_level():
    fine = " ".join(f"Sentence {n} has words{n} like town{n}." for n in range(6))
    model = Scripted(lambda key: "short" if key.startswith("0|b|") and "(2,)" in key else fine)
    records = generate({"a": "one", "b": "two"}, model, plan="by-level")
    assert [len(record["reply"]) for record in records] == [4, 2]
    assert records[1]["error"].startswith("level 2: expected 15 words") and list(records[0]["passages"]) == [
        "3",
        "2",
        "1",
        "0",
    ]


def test_keep_refuses_lists_that_contradict_the_likelihood(generator):
    records = generate(QUERIES, generator, seed=3, sampling=LOOSE, keep=0.6)
    scored = [record for record in records if "likelihood" in record]
    assert scored and {record["passages"] is None for record in scored} == {True, False}
    for record in scored:
        share = agreement({int(level): value for level, value in record["likelihood"].items()})
        assert (record["passages"] is None) == (share < 0.6)
        if record["passages"] is None:
            assert "query likelihood has" in record["error"]
        else:
            expected = query_likelihood(
                generator, [(record["query"], text) for text in record["passages"].values()]
            )
            assert list(record["likelihood"].values()) == pytest.approx(expected, abs=1e-3)
    with pytest.raises(GenerateError, match="needs a local model"):
        generate(QUERIES, Scripted(lambda key: FINE), plan="all-levels", keep=0.5)


def test_cut_at_any_byte_and_resumed_gives_the_same_file(generator, tmp_path):
    whole = tmp_path / "whole.jsonl"
    generator.batch_size = 5
    run = {"seed": 3, "sampling": LOOSE, "retries": 1, "levels": 2}
    generate(QUERIES, generator, out=whole, **run)
    expected = whole.read_bytes()
    assert expected.count(b"\n") > len(QUERIES)  # some were asked twice
    rng, cut = random.Random(5), tmp_path / "cut.jsonl"
    for _ in range(6):
        cut.write_bytes(expected[: rng.randrange(len(expected))])
        generate(QUERIES, generator, out=cut, **run)
        assert cut.read_bytes() == expected
    generator.batch_size = None


def test_killed_at_ten_random_moments_gives_the_same_file(tiny, tmp_path, monkeypatch):
    """SIGKILL at ten random moments of one run, then let it end: byte for byte the undisturbed file."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    queries = tmp_path / "queries.txt"
    queries.write_text("".join(f"word{n % 60} word{n // 60} query{n}\n" for n in range(80)), encoding="utf-8")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["repro.generate"])
    more = ("--retries", "1", "--levels", "2", "--max-new-tokens", "25")

    def start(out):
        process = context.Process(target=generate_module.main, args=(options(tiny, queries, out, *more),))
        process.start()
        return process

    begin = time.perf_counter()
    whole = start(tmp_path / "whole.jsonl")
    whole.join()
    duration = time.perf_counter() - begin
    expected = (tmp_path / "whole.jsonl").read_bytes()
    assert expected.count(b"\n") > 80
    rng, killed, sizes, out = random.Random(11), 0, [], tmp_path / "killed.jsonl"
    for _ in range(30):
        process = start(out)
        process.join(duration * rng.uniform(0.05, 0.3))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += process.exitcode == -signal.SIGKILL
            sizes.append(out.stat().st_size if out.exists() else 0)
        else:
            assert process.exitcode == 0
            out.unlink()  # it came to its end before the ten kills: once more from the start
        if killed == 10:
            break
    assert killed == 10 and len({size for size in sizes if 0 < size < len(expected)}) >= 3, sizes
    last = start(out)
    last.join()
    assert last.exitcode == 0
    assert out.read_bytes() == expected


def by_key(records):
    return {(record["id"], record["attempt"]): record for record in records}


def test_shards_of_any_number_make_the_same_records(tiny, query_file, tmp_path, monkeypatch, capsys):
    """One of two processes, then three, then one: nothing lost, nothing twice, equal to an unsharded run."""

    def run(out, rank=0, world=1, *more):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        assert main(options(tiny, query_file, out, "--retries", "1", *more)) == 0

    single, out = tmp_path / "single.jsonl", tmp_path / "sharded.jsonl"
    run(single)
    expected = by_key(cache.read_records(single))
    run(out, 0, 2)
    first = cache.shard_path(out, 0, 2)
    assert {record["id"] for record in cache.read_records(first)} < set(QUERIES) and not out.exists()
    for rank in range(3):
        run(out, rank, 3)
    run(out)
    files = [out, *cache.shards_of(out)]
    records = [record for path in files for record in cache.read_records(path)]
    assert len(records) == len(expected) and by_key(records) == expected
    assert main(["--merge", "--out", str(out)]) == 0
    assert by_key(cache.read_records(out)) == expected and cache.shards_of(out) == []
    before = out.read_bytes()
    run(out)
    assert out.read_bytes() == before


def test_torchrun_two_ranks(tiny, query_file, tmp_path):
    out = tmp_path / "x.jsonl"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_port=0",
        "-m",
        "repro.generate",
    ]
    done = subprocess.run(
        [*command, *options(tiny, query_file, out)],
        capture_output=True,
        text=True,
        cwd=Path(cache.__file__).parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [path.name for path in cache.shards_of(out)] == ["x.rank0-of-2.jsonl", "x.rank1-of-2.jsonl"]
    assert cache.merge(out) == len(QUERIES)
    assert {record["id"] for record in cache.read_records(out)} == set(QUERIES)


def test_full_disk_in_the_middle_of_a_run(tiny, query_file, tmp_path):
    """The kernel refuses to let the file grow: exit code 2, one sentence, whole records stay."""
    out = tmp_path / "x.jsonl"
    code = (
        "import resource, signal, sys\nfrom repro.generate import main\nsignal.signal(signal.SIGXFSZ, "
        "signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (12000, "
        "12000))\nsys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *options(tiny, query_file, out)],
        capture_output=True,
        text=True,
        cwd=Path(cache.__file__).parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "writing failed (File too large)" in done.stderr.strip().splitlines()[-1]
    kept = cache.read_records(out)
    assert 0 < len(kept) < len(QUERIES) and len(kept) % 5 == 0
    assert main(options(tiny, query_file, out)) == 0
    assert len(cache.read_records(out)) == len(QUERIES) and cache.read_records(out)[: len(kept)] == kept


@pytest.mark.checkpoint
def test_the_built_in_model_writes_one_list():
    generator = load_generator("smollm2-135m", device="cpu")
    record = generate(
        ["what causes tides"], generator, seed=2, sampling=Sampling(max_new_tokens=60), retries=3
    )[0]
    assert record["error"] is None and "tide" in record["passages"]["3"].lower()
