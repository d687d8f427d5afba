"""Generation: sampling by row, records, resume after kills, refusals, servers, the committed caches."""

import gzip
import hashlib
import http.server
import json
import multiprocessing
import random
import re
import threading
import time
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import graded_lists, write_lists
from transformers import AutoTokenizer, LlamaForCausalLM

from repro import checkpoints, data, prompts
from repro import generate as module
from repro.data import load_lists
from repro.generate import FIELDS, LocalGenerator, Sampling, ServerGenerator, generate, main, read_queries

CACHES = [data.AUTHORED, data.AUTHORED.with_name("smollm2-135m.jsonl")]
FINE = json.dumps({str(level): f"text {level}" for level in (3, 2, 1, 0)})
QUERIES, ASKED = {item.id: item.query for item in graded_lists(24)}, []

def make_model(source, folder, template="[END]{% for m in messages %} {{ m.content }} {% endfor %}", **own):
    tokenizer, model = AutoTokenizer.from_pretrained(source), LlamaForCausalLM.from_pretrained(source)
    tokenizer.chat_template, model.config.max_position_embeddings = template, 512
    tokenizer.save_pretrained(folder)
    model.lm_head.weight.data.mul_(9)  # sharp, so that a mistake in attention shows in the tokens
    model.generation_config.update(**own)
    model.save_pretrained(folder)
    return str(folder)

@pytest.fixture
def command(tiny_llama, tmp_path):
    queries, model = write_lists(tmp_path / "queries", 24), make_model(tiny_llama, tmp_path / "tiny-lm")
    text = f"--queries {queries} --out {tmp_path}/OUT --model {model} --device cpu --seed 3"
    return f"{text} --batch-size 5 --max-new-tokens 20 --temperature 1 --top-p 1 --top-k 0".split()

def scripted(answer):
    return SimpleNamespace(name="scripted", context=10**9, prompt=str, batch_size=2, reply=lambda jobs, _: [
        ASKED.append(name) or answer(name) for _, name in jobs])

def records_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

def refused(capsys, *command):
    assert main([str(part) for part in command]) == 2
    return capsys.readouterr().err.rpartition("error: ")[2]

def test_tokens_are_drawn_from_the_rows_own_numbers_with_the_right_shares():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 2.5]]).repeat(4001, 1)
    noise = torch.linspace(0, 1 - 1e-9, 4001, dtype=torch.float64)
    for temperature, top_p, top_k, kept in ((0.5, 1.0, 0, 5), (2.0, 1.0, 3, 3), (1.0, 0.7, 0, 2)):
        scores = module.draw_tokens(logits, noise, Sampling(5, temperature, top_p, top_k))
        assert (torch.isfinite(scores).sum(1) == 1).all() and (scores.max(1).values == 0).all()
        expected = (logits[0, (order := [3, 4, 2, 1, 0][:kept])].double() / temperature).softmax(0)
        assert (torch.isfinite(scores).double().mean(0)[order] - expected).abs().max() < 1e-3

def test_replies_do_not_depend_on_batch_or_order(tiny_llama, tmp_path):
    tiny = make_model(tiny_llama, tmp_path / "tiny")
    generator, other = LocalGenerator(tiny, "cpu"), LocalGenerator(tiny, "cpu", batch_size=7)
    options = {"seed": 3, "sampling": Sampling(20, 1.0, 1.0, 0), "pool": list(QUERIES.values())}
    whole = generate(QUERIES, generator, **options)
    assert [row["id"] for row in whole] == list(QUERIES) and all(list(row) == list(FIELDS) for row in whole)
    assert generate(dict(reversed(QUERIES.items())), other, **options)[::-1] == whole
    assert generate({"l5": QUERIES["l5"]}, generator, **options) == whole[5:6]
    own = make_model(tiny_llama, tmp_path / "own", repetition_penalty=9.0, do_sample=True, temperature=0.1)
    replies = [row["reply"] for row in generate(QUERIES, LocalGenerator(own, "cpu"), **options)]
    assert replies == [row["reply"] for row in whole] and len(set(map(str, replies))) == 24
    assert len({str(generate(QUERIES, x, sampling=Sampling(20, 0.0))) for x in (generator, other)}) == 1
    other.model.generate = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(ValueError, match="memory ran out with 7 prompts; lower --batch-size"):
        generate(QUERIES, other, **options)

def test_failed_replies_are_recorded_and_asked_again(tmp_path):
    out, queries = tmp_path / "new" / "x.jsonl", {"a": "one", "b": "two", "c": "never"}  # b: at the third try
    model = scripted(lambda name: FINE if name.split("|")[1:3] in (["a", "0"], ["b", "2"]) else '{"3": "one"')
    options = {"plan": "all-levels", "seed": 7, "out": out}
    best = generate(queries, model, **options, retries=2)
    assert [record["error"] for record in best] == [None, None, "levels 2, 1, 0 missing (found 1 of 4)"]
    assert (best[2]["passages"], best[2]["reply"]) == (None, '{"3": "one"')
    assert (best[2]["parameters"]["max_new_tokens"], best[2]["parameters"]["drawn"]) == (400, {})
    assert [row["id"] + str(row["attempt"]) for row in records_of(out)] == "c0 a0 b0 c1 b1 c2 b2".split()
    ASKED.clear()
    assert generate(queries, model, **options, retries=2) == best and ASKED == []
    generate(queries, model, **options, retries=3)
    assert [name.split("|")[1:3] for name in ASKED] == [["c", "3"]] and len(load_lists([out])) == 2
    sentences = " ".join(f"Sentence {n} has words{n} like town{n}." for n in range(6))
    records = generate(queries, scripted(lambda name: "short" if name == "0|b|0|(2,)" else sentences))
    assert [len(record["reply"]) for record in records] == [4, 2, 4]  # b is asked no further
    assert records[1]["error"].startswith("level 2: expected 15") and [*records[0]["passages"]] == [*"3210"]

def test_killed_or_cut_at_any_moment_the_file_ends_the_same(tmp_path):
    """SIGKILL at ten random moments, then cuts at random bytes: byte for byte the undisturbed file."""
    model = scripted(lambda name: (time.sleep(0.002), FINE if int(name.split("|")[1][1:]) % 3 else "no")[1])
    run = partial(generate, [f"query number{n}" for n in range(60)], model, plan="all-levels", retries=2)
    run(out=tmp_path / "whole")
    expected, out, rng, killed = (tmp_path / "whole").read_bytes(), tmp_path / "x", random.Random(11), 0
    while killed < 10:
        process = multiprocessing.get_context("fork").Process(target=run, kwargs={"out": out})
        process.start()
        process.join(rng.uniform(0.0, 0.06))
        process.kill()
        process.join()
        killed += process.exitcode != 0
        if out.exists() and out.read_bytes() == expected:
            out.unlink()  # it came to its end: once more from the start
    for cut in (None, *rng.sample(range(expected.index(b"\n") + 1, len(expected)), 5)):
        if cut:
            out.write_bytes(expected[:cut])
        run(out=out)
        assert out.read_bytes() == expected and expected.count(b"\n") == 60 + 20 + 20

RECORD = json.dumps(dict.fromkeys(FIELDS, "x") | {"parameters": {}}).encode()
FOREIGN = [b'{"_id": "a"}\n', b"notes", b'{"a": 1}\n{"torn', RECORD[:90], RECORD, RECORD + b"\nnotes\n{"]
REFUSALS = """--temperature 0.5 | temperature 1.0, this run has 0.5; --temperature nan | expected max_
--temperature 0 | temperature 1.0, this run has 0.0; --seed 4 | was written with seed 3, this run has 4
--plan all-levels | was written with prompt_sha256; --dtype int32 | unknown dtype; --out FOLDER | is a folder
--queries OTHER | with query 'how bread dough rise', this run has 'another'; --batch-size 0 | --batch-size
--limit 0 | --limit; --retries -1 | --retries; --shard 3/2 | --shard; --shard 0/2 | --shard; --top-p 0 | <= 1
--max-new-tokens 0 | max_new_tokens >= 1; --queries NONE | cannot be read; --model no-such | unknown model
--out /dev/null | expected records; --queries LONG --out LONG | expected records; --model PLAIN | --no-chat-
--queries LONG --out NEW | query 'long': does not fit; --model BROKEN | chat template fails.* no system"""

def test_what_the_command_refuses(command, tiny_llama, tmp_path, monkeypatch, capsys):
    out, _ = tmp_path / "OUT", (tmp_path / "FOLDER").mkdir()
    assert main(command) == 0
    before = out.read_bytes()
    (tmp_path / "OTHER").write_text('{"_id": "l0", "text": "another"}\n')
    (tmp_path / "LONG").write_text('{"_id": "long", "text": "' + "word1 " * 600 + '"}\n')
    plain = make_model(tiny_llama, tmp_path / "PLAIN", template=None)
    make_model(tiny_llama, tmp_path / "BROKEN", template="{{ raise_exception('no system') }}")
    for line in re.split("; |\n", REFUSALS):
        options, reason = re.sub("[A-Z]{3,}", lambda name: str(tmp_path / name[0]), line).split(" | ")
        assert re.search(reason, refused(capsys, *command, *options.split())), line
    assert main([*command, "--model", plain, "--no-chat-template", "--out", f"{tmp_path}/plain"]) == 0
    with checkpoints.locked(out):
        assert "another process is writing" in refused(capsys, *command)
    monkeypatch.setattr(LocalGenerator, "reply", Mock(side_effect=KeyboardInterrupt))
    assert main([*command, "--retries", "1"]) == 130 and "goes on from here" in capsys.readouterr().err
    assert out.read_bytes() == before and not (tmp_path / "NEW").exists()
    monkeypatch.setattr(module, "LocalGenerator", None)  # what is not its own is refused before any work
    for content in FOREIGN:
        out.write_bytes(content)
        assert "expected records" in refused(capsys, *command) and out.read_bytes() == content

def test_parts_joined_with_cat_are_the_whole_and_limits_are_nested(command, tmp_path, capsys):
    def made(name, *more):
        assert main([*command, *more, "--out", str(tmp_path / name)]) == 0
        return {record["id"]: record for record in records_of(tmp_path / name)}
    whole, parts = made("OUT"), [made(f"part{number}", "--shard", f"{number}/3") for number in (1, 2, 3)]
    assert sum(map(len, parts)) == len(whole) == 24 and parts[0] | parts[1] | parts[2] == whole
    (tmp_path / "joined").write_bytes(b"".join((tmp_path / f"part{n}").read_bytes() for n in (1, 2, 3)))
    assert made("joined") == whole and len(records_of(tmp_path / "joined")) == 24
    assert made("3", "--limit", "3").keys() < made("9", "--limit", "9").keys()
    assert re.search(r"9: 0 of 9 have passages; failed: l\d+: level 3", capsys.readouterr().out)

def test_query_files(tmp_path):
    row = '{"_id": "%s", "text": "%s"}\n'
    for name, keys, text in (
            ("x.jsonl", "a 7", row % ("a", " one  two ") + '{"_id": 7, "text": "three"}\n'),
            ("x.jsonl.gz", "q00001 z", '{"query": "one two"}\n{"query": "three", "id": "z", "reply": 1}\n'),
            ("x.txt.gz", "q00001 q00003", "\ufeffone two\n\nthree\n")):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if ".gz" in name else text.encode())
        assert read_queries(tmp_path / name) == dict(zip(keys.split(), ["one two", "three"], strict=True))
    bad = {row % ("a", "one") + row % ("a", "two"): ":2: the id 'a' or", '{"_id": "a"}\n': ":1: field 'text'"}
    bad |= {row % ("a", "one") + row % ("b", "One "): ":2: the id 'b' or", "": "found none"}
    for text, reason in bad.items():
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(ValueError, match=reason):
            read_queries(tmp_path / "bad.jsonl")
    for texts, more in ((["a", " "], {}), (["a"], {"retries": -1}), (["a"], {"shard": (2, 2)})):
        with pytest.raises(ValueError, match="expected text in all queries, retries >= 0"):
            generate(texts, scripted(str), **more)

GOOD = json.dumps({"choices": [{"message": {"content": f"{FINE} \ud800"}}]}).encode()

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):  # as an OpenAI-compatible server; `script`: (status, body) to answer before it works
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers["Authorization"], request))
        status, body = self.server.script.pop(0) if self.server.script else (200, GOOD)
        if status:
            self.send_response(status)
            self.send_header("Location", "/elsewhere")
            self.end_headers()
        self.wfile.write(body)  # without a status it is no HTTP at all

@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.script, listening.seen, listening.pauses = [], [], []
        monkeypatch.setattr(module.time, "sleep", listening.pauses.append)
        listening.url = f"http://127.0.0.1:{listening.server_port}/v1"
        threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
        yield listening
        listening.shutdown()

def test_a_server_writes_the_same_kind_of_records_and_may_be_busy(server, command, tmp_path):
    server.script[:] = [(429, b""), (503, b""), (200, b"{"), (200, b"[]"), (200, GOOD)]
    server.script += [(200, b"{}"), (None, b"no HTTP\r\n\r\n"), (None, b"")]
    options = f"--out {tmp_path}/OUT.jsonl --base-url {server.url} --model big --plan all-levels --workers 1"
    command = [*command[:2], *options.split(), "--top-k", "0"]
    assert main(command) == 0 and len(load_lists([tmp_path / "OUT.jsonl"])) == 24
    assert server.pauses[:9] == [0, 1, 2, 4, 8, 0, 1, 2, 4] and not any(server.pauses[9:])
    (path, key, request), *_, last = server.seen
    assert (path, key) == ("/v1/chat/completions", "Bearer sk-secret") and "top_k" not in request
    assert (request["model"], request["max_tokens"], request["temperature"]) == ("big", 400, 0.7)
    assert len(server.seen) == 24 + 7 and len({request["seed"] for *_, request in server.seen}) == 24
    assert main([*command, "--workers", "4"]) == 0 and server.seen[-1] is last

def test_server_errors_are_one_sentence_without_the_key(server, monkeypatch):
    for reason, answer in {
            r"1 tries, status 401: your key \*\*\* is": (401, b"your key sk-secret is\r\n\x1b[31m wrong"),
            "1 tries, status 302": (302, b""), "5 tries, status 503": (503, b""),
            "5 tries, no chat completion: Attr": (200, b'{"choices": [{"message": {"content": null}}]}'),
            "5 tries, no chat completion: ReadError.*4000000": (200, b'"' + b"x" * 5_000_000 + b'"'),
            "5 tries, no chat completion: RemoteProtocolError": (None, b"your \"sk-secret'\r\n\r\n")}.items():
        server.script[:] = [answer] * 5
        with pytest.raises(ValueError, match=reason) as caught:
            generate(["one"], ServerGenerator(server.url, "m"), plan="all-levels")
        assert (text := str(caught.value)).isprintable() and "sk-secret" not in text and len(text) < 500
    bad = "http://me:hush@host/v1 host:hush/v1 http://host?key=hush http://host:hush file:///hush"
    for url, key in [*((url, "") for url in bad.split()), ("http://host", "hush\nhush")]:
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(ValueError, match="^expected --base-url((?!hush).)*$"):
            ServerGenerator(url, "m")

def test_the_committed_caches_keep_the_contract():
    authored, made = map(records_of, CACHES)
    pool = [row["query"] for row in authored]
    specs = {f"authored-{path.stem[5:]}": path.read_bytes() for path in CACHES[0].parent.glob("SPEC-*.md")}
    for row in made:  # what today's prompt code would have asked and read
        calls = zip(prompts.calls("by-level"), row["reply"], strict=False)
        try:
            found = [prompts.read_reply("by-level", asked, text) for asked, text in calls]
            assert row["passages"] == {str(level): text for one in found for level, text in one.items()}
        except prompts.ReplyError as reason:
            assert row["error"] == str(reason) and row["passages"] is None
        assert row["parameters"].pop("drawn") == prompts.draw(row["query"], pool, 1) and row["seed"] == 1
        assert row["parameters"] == made[0]["parameters"] and row["prompt_sha256"][:16] == "e7e6da8299730b78"
    for row in authored:
        assert row["prompt_sha256"] == hashlib.sha256(specs[row["prompt_version"]]).hexdigest()
    assert all(list(row) == list(FIELDS) for row in authored + made)
    assert [len(load_lists([cache])) for cache in CACHES] == [1260, 418] and len(set(pool)) == 1260
    assert len({(row["id"], row["attempt"]) for row in made}) == len(made) == 521

@pytest.mark.checkpoint
def test_the_built_in_model_writes_what_it_wrote_for_the_committed_cache():
    record = records_of(CACHES[1])[0]
    chat = prompts.messages("by-level", (3,), record["query"], record["parameters"]["drawn"])
    text = LocalGenerator(device="cpu").reply([(chat, f"1|{record['id']}|0|(3,)")], Sampling(12))[0]
    assert len(text.split()) > 5 and record["reply"][0].startswith(text)
