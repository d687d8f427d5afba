"""Generation: sampling by row, records, going on after a stop, refusals, servers, the caches."""

import gzip
import http.server
import json
import multiprocessing
import random
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import graded_lists, write_jsonl, write_lists
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaForCausalLM

from repro import prompts
from repro.data import AUTHORED, load_lists
from repro.generate import (
    LocalGenerator,
    Sampling,
    ServerGenerator,
    draw_tokens,
    generate,
    main,
    read_queries,
)

FINE = json.dumps({str(level): f"text {level}" for level in prompts.LEVELS})
PROSE = "A river rises in the hills near the border. It then crosses one wide plain to the sea."
QUERIES = {item.id: item.query for item in graded_lists(24)}
TEMPLATE = "[END]{% for m in messages %} {{ m.content }}{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
CHAT = [{"role": "system", "content": "the cat"}, {"role": "user", "content": "is blue"}]


@pytest.fixture
def tiny(tiny_llama, tmp_path):
    """The tiny model with a chat template and room for a prompt; sharp, so that mistakes show."""
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    model.config.max_position_embeddings = 512
    model.lm_head.weight.data.mul_(9)
    model.generation_config.update(repetition_penalty=9.0)  # no record names it
    model.save_pretrained(tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama, chat_template=TEMPLATE)
    tokenizer.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.fixture
def command(tiny, tmp_path):
    """A command line for 24 queries and the tiny model."""
    queries = write_lists(tmp_path / "queries", 24)
    line = f"--queries {queries} --model {tiny} --out {tmp_path}/OUT --device cpu --seed 3"
    return f"{line} --batch-size 5 --max-new-tokens 20 --temperature 1 --top-p 1 --top-k 0".split()


def scripted(answer):
    """A generator that answers with `answer(name of the reply)`."""

    def reply(jobs, sampling):
        return [answer(name) for _, name in jobs]

    return SimpleNamespace(name="scripted", context=10**9, prompt=str, reply=reply)


def records_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "kept"),
    [(2.0, 1.0, 3, 3), (0.5, 0.95, 0, 3)],
)
def test_tokens_are_drawn_with_the_shares_of_the_softmax(temperature, top_p, top_k, kept):
    logits = torch.tensor([[3.0, 2.5, 2.0, 1.0, 0.0]]).double()
    noise = torch.linspace(0, 1 - 1e-9, 4001, dtype=torch.float64)
    scores = draw_tokens(logits.repeat(4001, 1), noise, Sampling(5, temperature, top_p, top_k))
    expected = torch.zeros(5, dtype=torch.float64)
    expected[:kept] = (logits[0, :kept] / temperature).softmax(0)
    torch.testing.assert_close(scores.exp().mean(0), expected, atol=1e-3, rtol=0)


def test_a_reply_depends_on_its_name_alone(tiny):
    model = LocalGenerator(tiny, "cpu")
    options = {"generator": model, "sampling": Sampling(20, 1.0, 1.0, 0)}
    whole = generate(QUERIES, **options)
    [single] = generate(QUERIES, limit=1, batch_size=1, **options)
    assert single in whole
    assert generate(QUERIES, batch_size=7, **options) == whole
    assert len({str(record["reply"]) for record in whole}) == 24


def test_a_template_without_a_systems_turn_gets_its_text_in_front(tiny):
    model = LocalGenerator(tiny, "cpu")
    model.tokenizer.chat_template = NO_SYSTEM
    assert model.tokenizer.decode(model.prompt(CHAT)) == "[END] the cat is blue"


def test_reasoning_that_the_template_opens_is_no_passage(tiny):
    model = LocalGenerator(tiny, "cpu")
    model.tokenizer.add_tokens("<think>")
    model.model.resize_token_embeddings(len(model.tokenizer))
    model.tokenizer.chat_template = TEMPLATE + "<think>"
    [record] = generate(["why is sky blue"], model)
    assert record["error"] == "the reasoning has no end, so there is no answer"


def test_a_record_has_all_that_its_reply_depends_on():
    [record] = generate(["one"], scripted(lambda name: FINE), plan="all-levels", seed=7)
    fields = "id query prompt_version plan generator parameters seed attempt reply passages error"
    assert " ".join(record) == fields
    expected = {"levels": [3, 2, 1, 0], **vars(Sampling(400)), "drawn": {}}
    assert record["parameters"] == expected
    assert record["passages"] == json.loads(record["reply"])


def test_a_failed_reply_is_asked_again_until_it_is_read(tmp_path):
    asked = []

    def answer(name):  # a is fine at its second attempt, b never
        asked.append(name)
        return FINE if name == "0|a|1|(3, 2, 1, 0)" else "no"

    out = tmp_path / "new" / "lists.jsonl"
    for retries in (2, 3):
        options = {"plan": "all-levels", "retries": retries, "out": out}
        best = generate({"a": "one", "b": "two"}, scripted(answer), **options)
        assert [record["attempt"] for record in best] == [1, retries]
    assert [name[2:5] for name in asked] == ["a|0", "b|0", "a|1", "b|1", "b|2", "b|3"]
    assert [item.id for item in load_lists([out])] == ["a"]


def test_after_a_failed_level_no_further_one_is_asked():
    [record] = generate(["one"], scripted(lambda name: PROSE if "(3,)" in name else "short"))
    assert record["reply"] == [PROSE, "short"]


def run_slowly(out):
    tqdm.set_lock(threading.RLock())  # a killed process would keep the common one for ever

    def answer(name):
        time.sleep(0.002)
        return FINE if int(name.split("|")[1][1:]) % 3 else "no"

    queries = [f"query number{n}" for n in range(60)]
    generate(queries, scripted(answer), plan="all-levels", retries=2, batch_size=2, out=out)


def test_a_killed_command_goes_on_with_the_same_result(tmp_path):
    out = tmp_path / "out"
    rng = random.Random(11)
    for _ in range(10):
        process = multiprocessing.get_context("fork").Process(target=run_slowly, args=[out])
        process.start()
        process.join(rng.uniform(0.0, 0.06))
        process.kill()
        process.join()
    run_slowly(out)
    run_slowly(tmp_path / "whole")
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_file_cut_at_any_byte_ends_the_same(tmp_path, share):
    out = tmp_path / "out"
    run_slowly(out)
    expected = out.read_bytes()
    out.write_bytes(expected[: int(share * len(expected))])
    run_slowly(out)
    assert out.read_bytes() == expected


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"sampling": Sampling(100, 0.5)}, "it has temperature 0.7, this run has 0.5"),
        ({"queries": ["two"]}, "it has query 'one', this run has 'two'"),
    ],
)
def test_a_file_is_not_gone_on_with_under_other_settings(tmp_path, other, reason):
    options = {"queries": ["one"], "plan": "all-levels", "out": tmp_path / "out"}
    model = scripted(lambda name: FINE)
    generate(generator=model, **options)
    with pytest.raises(ValueError, match=reason):
        generate(generator=model, **options | other)


@pytest.mark.parametrize("content", ["notes", "notes\n", '{"id": 1}\n', '{"a": 1}\n{"id": '])
def test_a_file_of_somebody_else_stays_as_it_is(tmp_path, content):
    out = tmp_path / "out"
    out.write_text(content)
    with pytest.raises(ValueError, match="expected records of this very command"):
        generate(["one"], scripted(lambda name: FINE), out=out)
    assert out.read_text() == content


def refused(capsys, *command):
    assert main([str(part) for part in command]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--batch-size", 0, "--batch-size"),
        ("--top-p", 0, "0 < top_p <= 1"),
        ("--temperature", "nan", "temperature and top_k >= 0"),
        ("--plan", "none", "plan: expected all-levels or by-level"),
        ("--max-new-tokens", 500, "24 of 24 do not fit into the model's 512 tokens"),
        ("--queries", "none", "cannot be read"),
        ("--model", "no-such", "unknown model"),
        ("--out", ".", "is not a file"),
        ("--base-url", "http://host:port/v1", "--base-url: Invalid"),
        ("--base-url", "localhost:8000/v1", "--base-url: expected http"),
    ],
)
def test_what_the_command_refuses(command, tmp_path, capsys, option, value, reason):
    assert reason in refused(capsys, *command, option, value)
    assert not (tmp_path / "OUT").exists()


def test_a_model_without_a_chat_template_needs_an_option(command, tiny_llama, capsys):
    command += ["--model", str(tiny_llama), "--limit", "1"]
    assert "its chat template fails; --no-chat-template?" in refused(capsys, *command)
    assert main([*command, "--no-chat-template"]) == 0


def test_a_query_that_does_not_fit_is_left_out_and_named(capsys):
    model = scripted(lambda name: FINE)
    model.context = 2000
    queries = {"long": "word " * 600, "short": "word"}
    [record] = generate(queries, model, plan="all-levels")
    assert record["id"] == "short"
    assert "1 of 2 do not fit into the model's 2000 tokens" in capsys.readouterr().err


def test_the_command_ends_with_what_failed(command, capsys):
    assert main([*command, "--limit", "3"]) == 0
    assert "0 of 3 have passages\nfailed: l" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "ids"),
    [
        ("x.jsonl", '{"_id": "a", "text": " one  two "}\n{"_id": 7, "text": "three"}', ["a", "7"]),
        ("x.jsonl.gz", '{"query": "one two"}\n{"query": "three", "id": "z"}', ["q00001", "z"]),
        ("x.txt.gz", "\ufeffone two\n\nthree\n", ["q00001", "q00003"]),
    ],
)
def test_files_of_queries(tmp_path, name, text, ids):
    opener = gzip.open if name.endswith(".gz") else open
    with opener(tmp_path / name, "wt", encoding="utf-8") as file:
        file.write(text)
    assert read_queries(tmp_path / name) == dict(zip(ids, ["one two", "three"], strict=True))


@pytest.mark.parametrize("second", [{"id": "b", "query": "One"}, {"_id": "a", "text": "two"}])
def test_a_repeated_query_or_id_is_left_out_and_named(tmp_path, capsys, second):
    path = write_jsonl(tmp_path / "x.jsonl", [{"_id": "a", "text": "one"}, second])
    assert read_queries(path) == {"a": "one"}
    message = f"1 of 2 queries or ids stood there before and are left out: '{path}:2'"
    assert message in capsys.readouterr().err


def test_an_empty_query_is_refused(tmp_path):
    with pytest.raises(ValueError, match=":1: field 'text'"):
        read_queries(write_jsonl(tmp_path / "bad.jsonl", [{"_id": "a", "text": " "}]))


def choice(content, **more):
    """The body of a server's answer."""
    return json.dumps({"choices": [{"message": {"content": content}, **more}]})


class Handler(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server; `server.answer(query's text)` gives (status, body, headers)."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers["Authorization"], request))
        status, body, headers = self.server.answer(request["messages"][1]["content"])
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args):
        """Nothing on stderr, which tests read."""


@pytest.fixture
def server(monkeypatch):
    """A running server that answers well; waiting takes no time and is written down."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.seen = []
        listening.pauses = []
        listening.answer = lambda text: (200, choice(FINE), {})
        listening.url = f"http://127.0.0.1:{listening.server_port}/v1"
        monkeypatch.setattr(time, "sleep", listening.pauses.append)
        threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
        yield listening
        listening.shutdown()


def ask(server, queries=("one", "two", "three"), **options):
    generator = ServerGenerator(server.url, "big")
    return generate(list(queries), generator, plan="all-levels", **options)


def test_a_server_is_asked_with_all_settings(server):
    ask(server, QUERIES.values(), sampling=Sampling(top_k=0))
    path, key, request = server.seen[0]
    assert path == "/v1/chat/completions"
    assert key == "Bearer sk-secret"
    assert request["max_tokens"] == 400
    assert "top_k" not in request
    assert len({request["seed"] for _, _, request in server.seen}) == 24


def test_a_busy_server_is_asked_again_after_the_time_that_it_names(server):
    busy = [(429, "", {"Retry-After": "60"}), (503, "", {"Retry-After": "20"})]
    server.answer = lambda text: busy.pop(0) if busy else (200, choice(FINE), {})
    [record] = ask(server, ["one"])
    assert record["error"] is None
    assert server.pauses == [60, 20]


def test_a_busy_server_that_names_no_time_gets_a_good_minute(server):
    server.answer = lambda text: (429, "", {})
    with pytest.raises(ValueError, match="all queries of a batch failed: Error code: 429"):
        ask(server, ["one"])
    assert sum(server.pauses) > 60


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((400, '{"error": {"code": "content_filter", "message": "filtered"}}'), "Error code: 400"),
        ((200, choice("Half of", finish_reason="content_filter")), "reason content_filter"),
        ((200, '{"choices": []}'), "no chat completion"),
        ((200, "<html>"), "no chat completion"),
        ((200, choice([1])), "no content"),
    ],
)
def test_one_query_that_is_refused_for_good_is_recorded(server, tmp_path, answer, reason):
    json_type = {"Content-Type": "application/json"}
    server.answer = lambda text: (*(answer if "two" in text else (200, choice(FINE))), json_type)
    records = ask(server, out=tmp_path / "out")
    assert [record["passages"] is None for record in records] == [False, True, False]
    assert reason in records[1]["error"]
    asked = len(server.seen)
    assert ask(server, out=tmp_path / "out") == records
    assert len(server.seen) == asked


@pytest.mark.parametrize("status", [302, 401, 403, 404, 400, 500, 503])
def test_what_concerns_all_queries_stops_the_command(server, command, tmp_path, capsys, status):
    body = json.dumps({"error": {"message": "your key sk-secret is\n\x1b[31m wrong"}})
    server.answer = lambda text: (status, body, {"Location": "/elsewhere"})
    message = refused(capsys, *command, "--base-url", server.url)
    assert f"Error code: {status} - your key *** is" in message
    assert message.strip().isprintable()
    assert "sk-secret" not in message
    assert {path for path, _, _ in server.seen} == {"/v1/chat/completions"}
    assert not (tmp_path / "OUT").exists()


def test_a_server_that_is_not_there_stops_the_command(server):
    server.url = "http://127.0.0.1:9/v1"
    with pytest.raises(ValueError, match="Connection error"):
        ask(server, ["one"])


def test_the_committed_lists_are_what_is_asked_and_read_today():
    pool = [record["query"] for record in records_of(AUTHORED)]
    for record in records_of(AUTHORED.with_name("smollm2-135m.jsonl")):
        assert record["parameters"]["drawn"] == prompts.draw(record["query"], pool, 1)
        for level, passage in (record["passages"] or {}).items():
            reply = record["reply"][3 - int(level)]
            assert prompts.read_reply("by-level", (level,), reply) == {level: passage}


@pytest.mark.checkpoint
def test_the_built_in_model_writes_what_it_wrote_for_the_committed_lists():
    record = records_of(AUTHORED.with_name("smollm2-135m.jsonl"))[0]
    chat = prompts.messages("by-level", (3,), record["query"], record["parameters"]["drawn"])
    jobs = [(chat, f"1|{record['id']}|0|(3,)")]
    [text] = LocalGenerator(device="cpu").reply(jobs, Sampling(12))
    assert len(text.split()) > 5
    assert record["reply"][0].startswith(text)
