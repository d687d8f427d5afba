"""Generation: sampling by row, records, resume after kills, refusals, servers, the committed caches."""

import gzip
import hashlib
import http.server
import json
import multiprocessing
import os
import random
import re
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from repro import files, prompts
from repro import generate as module
from repro.data import load_lists
from repro.generate import FIELDS, LocalGenerator, Sampling, ServerGenerator, generate, main, read_queries

CACHED = files.AUTHORED.parent
FINE = json.dumps({str(level): f"text {level}" for level in (3, 2, 1, 0)})
LOOSE = Sampling(max_new_tokens=40, temperature=1.0, top_p=1.0, top_k=0)
QUERIES = {f"q{n:02d}": " ".join(f"word{(n * 7 + j * 3) % 60}" for j in range(1 + n % 6)) for n in range(24)}
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} [END] {% endfor %}<assistant>"


def make_model(folder, template=TEMPLATE, **own):
    """A random 2-layer Llama whose vocabulary holds full stops, so that its replies have sentences."""
    words = ["[PAD]", "[UNK]", "[END]", "<system>", "<user>", "<assistant>", *(f"word{n}" for n in range(60))]
    words += [
        f"end{n}." for n in range(12)
    ] + "write an excerpt of web page that gives the exact about".split()
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[END]", "chat_template": template}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": len(words), "max_position_embeddings": 512, "eos_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.lm_head.weight.data.mul_(4)  # sharp, so that a mistake in attention shows in the tokens
    model.generation_config.update(**own)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("lm") / "tiny-lm")


@pytest.fixture
def command(tiny, tmp_path):
    """A command line that works; it writes OUT."""
    rows = [json.dumps({"_id": key, "text": query}) + "\n" for key, query in QUERIES.items()]
    (tmp_path / "queries.jsonl").write_text("".join(rows))
    text = f"--queries {tmp_path}/queries.jsonl --out {tmp_path}/OUT --model {tiny} --device cpu --seed 3"
    return f"{text} --batch-size 5 --max-new-tokens 40 --temperature 1 --top-p 1 --top-k 0".split()


class Scripted:
    """A generator that answers by the name of what it is asked."""

    name, context = "scripted", 10**9

    def __init__(self, answer):
        self.answer, self.asked, self.prompt, self.rows = answer, [], str, lambda *_: 2

    def reply(self, jobs, sampling, tick):
        self.asked += [name for _, name in jobs]
        return [self.answer(name) for _, name in jobs]


def records_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def raises(error):
    raise error


def refused(capsys, *command):
    assert main([str(part) for part in command]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_tokens_are_drawn_from_the_rows_own_numbers_with_the_right_shares():
    logits, ids = torch.tensor([[0.0, 1.0, 2.0, 3.0, 2.5]]).repeat(4001, 1), torch.ones(4001, 1)
    noise = torch.linspace(0, 1 - 1e-9, 4001, dtype=torch.float64)[:, None]
    for temperature, top_p, top_k, kept in ((0.5, 1.0, 0, 5), (2.0, 1.0, 3, 3), (1.0, 0.7, 0, 2)):
        sampler = module.RowSampler(noise, Sampling(5, temperature, top_p, top_k), 0, int)
        scores, order = sampler(ids, logits), [3, 4, 2, 1, 0][:kept]
        assert (torch.isfinite(scores).sum(1) == 1).all() and (scores.max(1).values == 0).all()
        expected = (logits[0, order].double() / temperature).softmax(0)
        assert (torch.isfinite(scores).double().mean(0)[order] - expected).abs().max() < 1e-3
    assert torch.equal(module.RowSampler(noise, Sampling(5, 0.0), 0, int)(ids, logits), logits)  # greedy


def test_replies_do_not_depend_on_batch_order_or_memory(tiny, tmp_path, monkeypatch, capsys):
    generator, other = LocalGenerator(tiny, "cpu"), LocalGenerator(tiny, "cpu", batch_size=7)
    options = {"seed": 3, "sampling": LOOSE, "retries": 1, "pool": list(QUERIES.values())}
    whole = generate(QUERIES, generator, **options)
    assert [row["id"] for row in whole] == list(QUERIES) and all(list(row) == list(FIELDS) for row in whole)
    assert {row["passages"] is None for row in whole} == {True, False}  # the tiny model fails now and then
    decode, memory = other.model.generate, RuntimeError("CUDA out of memory. Tried to allocate")
    other.model.generate = lambda ids, **more: decode(ids, **more) if len(ids) < 4 else raises(memory)
    assert generate(dict(reversed(QUERIES.items())), other, **options)[::-1] == whole
    assert "memory ran out with 7 prompts; going on with 4\n" in capsys.readouterr().err and other.most == 2
    assert generate({"q05": QUERIES["q05"]}, generator, **options) == whole[5:6]
    assert generate(QUERIES, generator, **options | {"seed": 4})[0]["reply"] != whole[0]["reply"]
    own = make_model(tmp_path / "own", repetition_penalty=9.0, do_sample=True, temperature=0.1)
    replies = [row["reply"] for row in generate(QUERIES, LocalGenerator(own, "cpu"), **options)]
    assert replies == [row["reply"] for row in whole]
    for free, rows in {10**12: 64, 10**7: 41, 1: 1}.items():
        monkeypatch.setattr(module.psutil, "virtual_memory", lambda free=free: Mock(available=free))
        assert generator.rows(100, LOOSE) == rows


def test_failed_replies_are_recorded_and_asked_again(tmp_path):
    """Query b works at the third try, c never; what was made is not made again."""
    out, queries = tmp_path / "new" / "x.jsonl", {"a": "one", "b": "two", "c": "three"}
    model = Scripted(lambda name: FINE if name.split("|")[1:3] in (["a", "0"], ["b", "2"]) else '{"3": "one"')
    options = {"plan": "all-levels", "seed": 7, "retries": 2, "out": out}
    best = generate(queries, model, **options)
    assert [record["passages"] is None for record in best] == [False, False, True]
    assert best[2]["error"] == "levels 2, 1, 0 missing (found 1 of 4)" and best[2]["reply"] == '{"3": "one"'
    assert [row["id"] + str(row["attempt"]) for row in records_of(out)] == "c0 a0 b0 c1 b1 c2 b2".split()
    model.asked.clear()
    assert generate(queries, model, **options) == best and model.asked == []
    generate(queries, model, **options | {"retries": 3})
    assert [name.split("|")[1:3] for name in model.asked] == [["c", "3"]] and len(load_lists([out])) == 2
    sentences = " ".join(f"Sentence {n} has words{n} like town{n}." for n in range(6))
    records = generate(queries, Scripted(lambda name: "short" if name == "0|b|0|(2,)" else sentences))
    assert [len(record["reply"]) for record in records] == [4, 2, 4]  # b is asked no further
    assert (
        records[1]["error"].startswith("level 2: expected 15") and "".join(records[0]["passages"]) == "3210"
    )


def test_killed_or_cut_at_any_moment_the_file_ends_the_same(tmp_path):
    """SIGKILL at ten random moments, then cuts at random bytes: byte for byte the undisturbed file."""
    queries = {f"q{n:03d}": f"query number{n}" for n in range(60)}
    rng, out = random.Random(11), tmp_path / "x"
    model = Scripted(lambda name: (time.sleep(0.002), FINE if int(name.split("|")[1][1:]) % 3 else "no")[1])

    def run(path=out):
        generate(queries, model, plan="all-levels", retries=2, out=path)

    run(tmp_path / "whole")
    expected, killed = (tmp_path / "whole").read_bytes(), 0
    assert expected.count(b"\n") == 60 + 20 + 20
    while killed < 10:
        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        process.join(rng.uniform(0.0, 0.06))
        process.kill()
        process.join()
        killed += process.exitcode != 0
        if out.exists() and out.read_bytes() == expected:
            out.unlink()  # it came to its end: once more from the start
    run()
    assert out.read_bytes() == expected
    for cut in rng.sample(range(expected.index(b"\n") + 1, len(expected)), 5):
        out.write_bytes(expected[:cut])
        run()
        assert out.read_bytes() == expected
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "x"}


RECORD = json.dumps(dict.fromkeys(FIELDS, "x") | {"parameters": {}}).encode()
FOREIGN = [b'{"_id": "a", "text": "b"}\n', b"notes", b'{"a": 1}\n{"torn', RECORD[:90], RECORD + b"\nnotes\n{"]


@pytest.mark.parametrize("content", FOREIGN)
def test_a_file_that_is_not_its_own_is_refused_and_stays(command, tmp_path, monkeypatch, capsys, content):
    (tmp_path / "OUT").write_bytes(content)
    monkeypatch.setattr(module, "LocalGenerator", None)  # refused before any work
    assert "expected a record of this command" in refused(capsys, *command)
    assert (tmp_path / "OUT").read_bytes() == content


REFUSALS = """--temperature 0.5 | was written with temperature 1.0, this run has 0.5
--temperature 0 | was written with temperature 1.0, this run has 0.0
--seed 4 | was written with seed 3, this run has 4
--plan all-levels | was written with prompt_sha256
--queries OTHER | was written with query 'word0', this run has 'another text'
--temperature nan | temperature
--top-p 0 | 0 < top_p <= 1
--max-new-tokens 0 | max_new_tokens >= 1
--batch-size 0 | --batch-size 0: expected
--limit 0 | --limit
--retries -1 | --retries
--shard 3/2 | --shard
--queries OUT | --out: is the file of --queries
--queries NONE | cannot be read
--model no-such-model | unknown model
--dtype int32 | unknown dtype
--out FOLDER | is a folder
--out NEW.gz | --out: is plain text
--out /dev/null | expected a file
--queries LONG --out NEW | query 'long': does not fit"""


def test_what_the_command_refuses(command, tmp_path, monkeypatch, capsys):
    out, _ = tmp_path / "OUT", (tmp_path / "FOLDER").mkdir()
    assert main(command) == 0
    before = out.read_bytes()
    (tmp_path / "OTHER").write_text('{"_id": "q00", "text": "another text"}\n')
    (tmp_path / "LONG").write_text('{"_id": "long", "text": "' + "word1 " * 600 + '"}\n')
    for line in REFUSALS.splitlines():
        options, reason = re.sub("[A-Z]{3,}", lambda name: str(tmp_path / name[0]), line).split(" | ")
        assert reason in refused(capsys, *command, *options.split()), line
    with files.locked(out):
        assert "another process is writing" in refused(capsys, *command)
    monkeypatch.setattr(LocalGenerator, "reply", lambda *_: raises(KeyboardInterrupt))
    assert main([*command, "--retries", "1"]) == 130 and "goes on from here" in capsys.readouterr().err
    assert out.read_bytes() == before and not (tmp_path / "NEW").exists()


def test_parts_joined_with_cat_are_the_whole_and_limits_are_nested(command, tmp_path, monkeypatch, capsys):
    def made(name, *more):
        assert main([*command, *more, "--out", str(tmp_path / name)]) == 0
        return {record["id"]: record for record in records_of(tmp_path / name)}

    whole = made("OUT")
    parts = [made(f"part{number}", "--shard", f"{number}/3") for number in (1, 2, 3)]
    assert sum(map(len, parts)) == len(whole) == 24 and parts[0] | parts[1] | parts[2] == whole
    joined = b"".join((tmp_path / f"part{number}").read_bytes() for number in (1, 2, 3))
    (tmp_path / "joined").write_bytes(joined)
    assert made("joined") == whole and (tmp_path / "joined").read_bytes() == joined
    assert made("3", "--limit", "3").keys() < made("9", "--limit", "9").keys()

    monkeypatch.setattr(os, "fsync", lambda descriptor: raises(OSError(28, "No space left on device")))
    assert "writing failed (No space left on device)" in refused(capsys, *command, "--out", tmp_path / "full")
    monkeypatch.undo()
    assert len(records_of(tmp_path / "full")) == 5 and made("full") == whole


def test_chat_templates(command, tmp_path, capsys):
    plain = [*command, "--limit", "2", "--model", make_model(tmp_path / "plain", template=None)]
    assert "no chat template; use --no-chat-template" in refused(capsys, *plain)
    assert main([*plain, "--no-chat-template"]) == 0
    broken = make_model(tmp_path / "broken", template="{{ raise_exception('no system') }}")
    with pytest.raises(ValueError, match="template refuses this prompt: no system"):
        generate(QUERIES, LocalGenerator(broken, "cpu"))


def test_query_files(tmp_path):
    row = '{"_id": "%s", "text": "%s"}\n'
    good = {row % ("a", " one  two ") + '{"_id": 7, "text": "three"}\n': ("x.jsonl", "a 7")}
    good['{"query": "one two", "passages": {}}\n{"query": "three", "id": "z"}\n'] = ("x.jsonl", "q00001 z")
    good["\ufeffone two\n\nthree\n"] = ("x.txt", "q00001 q00003")
    for text, (name, keys) in good.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        for path in (name, f"{name}.gz"):
            assert read_queries(tmp_path / path) == dict(zip(keys.split(), ["one two", "three"], strict=True))
    bad = {row % ("a", "one") + row % ("a", "two"): ":2: field '_id': 'a' stands", "": "found none"}
    bad[row % ("a", "one") + row % ("b", "One ")] = ":2: field 'text': the same"
    for text, reason in (bad | {'{"_id": "a"}\n': ":1: field 'query'"}).items():
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(ValueError, match=reason):
            read_queries(tmp_path / "bad.jsonl")
    for texts, more in ((["a", " "], {}), (["a"], {"retries": -1}), (["a"], {"shard": (2, 2)})):
        with pytest.raises(
            ValueError, match="query 'q00002': expected text|expected retries >= 0 and a shard"
        ):
            generate(texts, Scripted(str), **more)


class Handler(http.server.BaseHTTPRequestHandler):
    """A stand-in for an OpenAI-compatible server: `script` holds (status, body) to answer before it works."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers["Authorization"], request))
        content = json.dumps({"choices": [{"message": {"content": f"{FINE} \ud800"}}]}).encode()
        status, body = self.server.script.pop(0) if self.server.script else (200, content)
        if status:
            self.send_response(status)
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
        self.wfile.write(body)  # without a status it is no HTTP at all

    do_GET = do_POST

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.script, listening.seen = [], []
        listening.url = f"http://127.0.0.1:{listening.server_port}/v1"
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield listening
        listening.shutdown()


def test_a_server_writes_the_same_kind_of_records(server, command, tmp_path, capsys):
    out = tmp_path / "server.jsonl"
    options = f"--out {out} --base-url {server.url} --api-model big --plan all-levels --workers 4 --seed 5"
    command = [*command[:2], *options.split()]
    assert main(command) == 0 and len(load_lists([out])) == 24 and b"sk-secret" not in out.read_bytes()
    path, key, request = server.seen[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer sk-secret")
    assert (request["model"], request["max_tokens"], request["temperature"]) == ("big", 400, 0.7)
    assert len({request["seed"] for *_, request in server.seen}) == 24
    server.seen.clear()
    assert main(command) == 0 and server.seen == []
    assert "--top-k" in refused(capsys, *command, "--top-k", "3")


NULL = b'{"choices": [{"message": {"content": null}}]}'
SHAKY = [
    (429, b""),
    (503, b""),
    (200, b"{"),
    (200, b"[]"),
    (200, NULL),
    (None, b"no HTTP\r\n\r\n"),
    (None, b""),
]


def test_a_busy_or_broken_answer_is_asked_for_again(server):
    server.script[:] = SHAKY
    model = ServerGenerator(server.url, "m", workers=1, tries=8, pause=0.001)
    assert generate(["one"], model, plan="all-levels")[0]["passages"]["0"] == "text 0"
    assert len(server.seen) == 8 and len({json.dumps(row) for row in server.seen}) == 1


FATAL = {
    "after 1 tries, status 401, .*your key \\*\\*\\* is": [(401, b"your key sk-secret is\r\n\x1b[31m wrong")],
    "after 1 tries, status 302": [(302, b"")],
    "after 3 tries, status 503": [(503, b"")] * 3,
    "after 3 tries, the reply is no chat completion": [(200, NULL)] * 3,
    "after 1 tries, status 200, 4000001 bytes": [(200, b"x" * 5_000_000)],
}


@pytest.mark.parametrize("reason", FATAL)
def test_server_errors_are_one_sentence_without_the_key(server, reason):
    server.script[:] = FATAL[reason]
    with pytest.raises(ValueError, match=reason) as caught:
        generate(["one"], ServerGenerator(server.url, "m", tries=3, pause=0.001), plan="all-levels")
    text = str(caught.value)
    assert text.isprintable() and "sk-secret" not in text and len(text) < 500
    assert all(path == "/v1/chat/completions" for path, *_ in server.seen)  # no redirect was followed


def test_addresses_and_keys_that_are_refused_are_not_shown(monkeypatch):
    with pytest.raises(ValueError, match="gave no reply after 1 tries, no answer"):
        generate(["one"], ServerGenerator("http://127.0.0.1:9", "m", tries=1), plan="all-levels")
    bad = "http://me:hush@host/v1 host:hush/v1 http://host?key=hush http://host:hush file:///hush"
    for url, key in [*((url, "") for url in bad.split()), ("http://host", "hush\nhush")]:
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(ValueError, match="^(--base-url|OPENAI_API_KEY): expected") as caught:
            ServerGenerator(url, "m")
        assert "hush" not in str(caught.value)


def test_the_committed_caches_keep_the_contract():
    authored, made = (records_of(CACHED / name) for name in ("authored.jsonl", "smollm2-135m.jsonl"))
    specs = {f"authored-{path.stem[5:]}": path.read_bytes() for path in CACHED.glob("SPEC-*.md")}
    pool, versions = [row["query"] for row in authored], [row["prompt_version"] for row in authored]
    assert [versions.count(name) for name in sorted(specs)] == [540, 720] and len(set(pool)) == 1260
    for row in made:  # what today's prompt code would have asked and read
        found, error = {}, None
        for (level,), text in zip(prompts.calls("by-level"), row["reply"], strict=False):
            try:
                found[str(level)] = prompts.read_reply("by-level", (level,), text)[level]
            except prompts.ReplyError as reason:
                error = str(reason)
        assert row["error"] == error and row["passages"] == (None if error else found) and row["seed"] == 1
        assert row["parameters"].pop("drawn") == prompts.draw(row["query"], pool, 1)
        assert row["parameters"] == made[0]["parameters"] and list(row) == list(FIELDS)
        assert row["prompt_sha256"] == prompts.prompt_sha256("by-level")
    for row in authored:
        assert list(row) == list(FIELDS) and list(row["passages"]) == ["3", "2", "1", "0"]
        assert row["prompt_sha256"] == hashlib.sha256(specs[row["prompt_version"]]).hexdigest()
        assert all(map(str.strip, row["passages"].values()))
    assert len({(row["id"], row["attempt"]) for row in made}) == len(made) == 521
    sizes = [len(load_lists([CACHED / name])) for name in ("authored.jsonl", "smollm2-135m.jsonl")]
    note = (CACHED / "README.md").read_text(encoding="utf-8")
    assert sizes == [1260, 418] and "418 of 420 queries" in note and "521 records" in note


@pytest.mark.checkpoint
def test_the_built_in_model_writes_what_it_wrote_for_the_committed_cache():
    record = records_of(CACHED / "smollm2-135m.jsonl")[0]
    chat = prompts.messages("by-level", (3,), record["query"], record["parameters"]["drawn"])
    job = (chat, f"{record['seed']}|{record['id']}|0|(3,)")
    text = LocalGenerator(device="cpu").reply([job], Sampling(max_new_tokens=12), int)[0]
    assert len(text.split()) > 5 and record["reply"][0].startswith(text)
