"""Generation: sampling by row, records, going on after a stop, refusals, servers, the caches."""

import gzip
import http.server
import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import graded_lists, write_jsonl, write_lists
from transformers import AutoTokenizer, LlamaForCausalLM

from repro import prompts
from repro.data import AUTHORED, load_lists, read_jsonl
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
WRITTEN = AUTHORED.with_name("smollm2-135m.jsonl")
ONE = {"a": "one"}
TWO = {**ONE, "b": "two"}
QUERIES = {item.id: item.query for item in graded_lists(24)}
TEMPLATE = "[END]{% for m in messages %} {{ m.content }}{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE


@pytest.fixture
def tiny(tiny_llama, tmp_path):
    """The tiny model with a chat template and room for a prompt; sharp, so that mistakes show."""
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    model.config.max_position_embeddings = 512
    model.lm_head.weight.data.mul_(9)
    model.generation_config.update(repetition_penalty=9.0)  # no record names it
    folder = tmp_path / "tiny"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama, chat_template=TEMPLATE).save_pretrained(folder)
    return str(folder)


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


def test_the_seed_draws_the_queries_of_a_limit_and_the_distant_topics():
    found = {}
    for limit, field in ((5, "id"), (24, "parameters")):
        for seed in (0, 1):
            records = generate(QUERIES, scripted(str), seed=seed, limit=limit)
            found[field, seed] = [record[field] for record in records]
        assert found[field, 0] != found[field, 1]


@pytest.mark.parametrize("sampling", [Sampling(5, 2.0, 1.0, 3), Sampling(5, 0.5, 0.95, 0)])
def test_tokens_are_drawn_with_the_shares_of_the_softmax(sampling):
    logits = torch.tensor([3.0, 2.5, 2.0, 1.0, 0.0]).double()  # both leave three
    noise = torch.linspace(0, 1 - 1e-9, 4001, dtype=torch.float64)
    scores = draw_tokens(logits.repeat(4001, 1), noise, sampling)
    shares = scores.isinf().double().mean(0)
    expected = (logits[:3] / sampling.temperature).softmax(0)
    torch.testing.assert_close(shares[:3], expected, atol=1e-3, rtol=0)


def test_a_reply_depends_on_its_name_alone(tiny):
    model = LocalGenerator(tiny, "cpu")
    options = {"generator": model, "sampling": Sampling(20, 1.0, 1.0, 0)}
    whole = generate(QUERIES, **options)
    [single] = generate(QUERIES, limit=1, batch_size=1, **options)
    assert single in whole
    assert generate(QUERIES, batch_size=7, **options) == whole
    assert len({str(record["reply"]) for record in whole}) == 24


def test_a_model_computes_as_asked_and_without_settings_of_its_own(tiny):
    model = LocalGenerator(tiny, "cpu", "bfloat16").model
    assert model.dtype == torch.bfloat16
    assert model.generation_config.repetition_penalty in (None, 1)


def test_a_template_without_a_systems_turn_gets_its_text_in_front(tiny):
    model = LocalGenerator(tiny, "cpu")
    model.tokenizer.chat_template = NO_SYSTEM
    turns = [{"role": "system", "content": "the cat"}, {"role": "user", "content": "is blue"}]
    assert model.tokenizer.decode(model.prompt(turns)) == "[END] the cat is blue"


def test_reasoning_that_the_template_opens_is_no_passage(tiny):
    model = LocalGenerator(tiny, "cpu")
    model.tokenizer.add_tokens("<think>")
    model.model.resize_token_embeddings(len(model.tokenizer))
    model.tokenizer.chat_template = TEMPLATE + "<think>"
    [record] = generate({"a": "why is sky blue"}, model)
    assert record["error"] == "the reasoning has no end, so there is no answer"


def test_a_record_has_all_that_its_reply_depends_on():
    [record] = generate(ONE, scripted(lambda name: FINE), plan="all-levels", seed=7)
    fields = "id query prompt_version plan generator parameters seed attempt reply passages error"
    assert " ".join(record) == fields
    assert record["parameters"] == {"levels": [3, 2, 1, 0], **vars(Sampling(400)), "drawn": {}}
    assert record["passages"] == json.loads(record["reply"])


def test_a_failed_reply_is_asked_again_until_it_is_read(tmp_path):
    asked = []

    def answer(name):  # a is fine at its second attempt, b never
        asked.append(name[2:5])
        return FINE if "|a|1" in name else "no"

    options = {"plan": "all-levels", "out": tmp_path / "new" / "lists.jsonl"}
    for retries in (2, 3):
        best = generate(TWO, scripted(answer), retries=retries, **options)
        assert [record["attempt"] for record in best] == [1, retries]
    assert asked == ["a|0", "b|0", "a|1", "b|1", "b|2", "b|3"]
    assert [item.id for item in load_lists(options["out"])] == ["a"]


def test_after_a_failed_level_no_further_one_is_asked():
    [record] = generate(ONE, scripted(lambda name: PROSE if "(3,)" in name else "short"))
    assert record["reply"] == [PROSE, "short"]


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.5, 0.7, 0.999, 1 - 1e-9])
def test_a_file_cut_inside_a_record_ends_the_same(tmp_path, share):
    out = tmp_path / "out"
    model = scripted(lambda name: FINE if int(name[4:7]) % 3 else "no")
    options = {"plan": "all-levels", "retries": 2, "batch_size": 2, "out": out}
    queries = {f"q{n:05}": f"query number{n}" for n in range(20)}
    whole = generate(queries, model, **options)
    expected = out.read_bytes()
    out.write_bytes(expected[: int(share * len(expected))])
    assert generate(queries, model, **options) == whole
    assert out.read_bytes() == expected


@pytest.mark.parametrize(
    "queries, temperature, reason",
    [
        (TWO, 0.5, "it has temperature 0.7, this run has 0.5"),
        (TWO | {"a": "six"}, 0.7, "it has query 'one', this run has 'six'"),
        (ONE, 0.7, "it has id 'b', which is not planned"),
    ],
)
def test_a_file_goes_on_with_more_queries_but_not_with_others(
    tmp_path, queries, temperature, reason
):
    options = {"generator": scripted(lambda name: PROSE), "out": tmp_path / "out"}
    [first] = generate(ONE, **options)
    assert generate(TWO, **options)[0] == first
    with pytest.raises(ValueError, match=f"out: .*{reason}"):
        generate(queries, sampling=Sampling(100, temperature), **options)


@pytest.mark.parametrize(
    "content", ["notes", "notes\n", '{"id": 1}', '{"id": 1}\n', '{"a": 1}\n{"id": ']
)
def test_a_file_of_somebody_else_stays_as_it_is(tmp_path, content):
    out = tmp_path / "out"
    out.write_text(content)
    with pytest.raises(ValueError, match="expected records of this very command"):
        generate(ONE, scripted(lambda name: FINE), out=out)
    assert out.read_text() == content


def refused(capsys, *command):
    assert main([str(part) for part in command]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "option, value, reason",
    [
        ("--batch-size", 0, "--batch-size"),
        ("--top-p", 0, "0 < top_p <= 1"),
        ("--temperature", "nan", "temperature and top_k >= 0"),
        ("--plan", "none", "plan: expected all-levels or by-level"),
        ("--max-new-tokens", 500, "24 of 24 do not fit into the model's 512 tokens"),
        ("--queries", "none", "cannot be read"),
        ("--model", "no-such", "unknown model"),
        ("--out", "/", "exists; name another file"),
        ("--base-url", "http://host:port/v1", "--base-url: Invalid"),
        ("--base-url", "localhost:8000/v1", "--base-url: expected http"),
    ],
)
def test_what_the_command_refuses(command, tmp_path, capsys, option, value, reason):
    assert reason in refused(capsys, *command, option, value)
    assert not (tmp_path / "OUT").exists()


def test_a_model_without_a_chat_template_is_refused(command, tiny_llama, capsys):
    message = refused(capsys, *command, "--model", tiny_llama)
    assert "llama: its chat template fails: Cannot use chat template" in message


def test_a_query_that_does_not_fit_is_left_out_and_named(capsys):
    model = scripted(lambda name: FINE)
    model.context = 2000
    [record] = generate({"a": "word " * 600, "b": "word"}, model)
    assert record["id"] == "b"
    assert "1 of 2 do not fit into the model's 2000 tokens" in capsys.readouterr().err


def test_the_command_ends_with_what_failed(command, capsys):
    assert main([*command, "--limit", "3"]) == 0
    assert "0 of 3 have passages\nfailed: l" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, text, ids",
    [
        ("x.jsonl", '{"_id": "a", "text": " one  two "}\n{"_id": 7, "text": "three"}', ["a", "7"]),
        ("x.jsonl", '{"query": "one two"}\n{"query": "three", "id": "z"}', ["q00001", "z"]),
        ("x.txt.gz", "\ufeffone two\n\nthree\n", ["q00001", "q00003"]),
    ],
)
def test_files_of_queries(tmp_path, name, text, ids):
    content = text.encode()
    if name.endswith(".gz"):
        content = gzip.compress(content)
    (tmp_path / name).write_bytes(content)
    assert read_queries(tmp_path / name) == dict(zip(ids, ["one two", "three"], strict=True))


@pytest.mark.parametrize("second", [{"id": "b", "query": "One"}, {"_id": "a", "text": "two"}])
def test_a_repeated_query_or_id_is_left_out_and_named(tmp_path, capsys, second):
    path = write_jsonl(tmp_path / "x.jsonl", [{"_id": "a", "text": "one"}, second])
    assert read_queries(path) == {"a": "one"}
    expected = f"1 of 2 queries or ids stood there before and are left out: '{path}:2'"
    assert expected in capsys.readouterr().err


def test_an_empty_query_is_refused(tmp_path):
    with pytest.raises(ValueError, match=":1: field 'text'"):
        read_queries(write_jsonl(tmp_path / "bad.jsonl", [{"_id": "a", "text": " "}]))


def choice(content, reason="stop"):
    """The body of a server's answer."""
    return json.dumps({"choices": [{"message": {"content": content}, "finish_reason": reason}]})


class Handler(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server; `server.answer(query's text)` gives (status, body)."""

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        request = json.loads(self.rfile.read(length))
        self.server.seen.append((self.path, self.headers["Authorization"], request))
        status, body = self.server.answer(request["messages"][1]["content"])
        self.send_response(status)
        for header in self.server.headers.items():
            self.send_header(*header)
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
        listening.headers = {"Content-Type": "application/json"}
        listening.answer = lambda text: (200, choice(FINE))
        listening.url = f"http://127.0.0.1:{listening.server_port}/v1"
        monkeypatch.setattr(time, "sleep", listening.pauses.append)
        threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
        yield listening
        listening.shutdown()


def ask(server, queries=ONE, **options):
    return generate(queries, ServerGenerator(server.url, "big"), plan="all-levels", **options)


def test_a_server_is_asked_with_all_settings(server):
    ask(server, QUERIES, sampling=Sampling(9, 0.5, 0.6, 7))
    path, key, request = server.seen[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer sk-secret")
    expected = {"max_tokens": 36, "temperature": 0.5, "top_p": 0.6, "top_k": 7, "model": "big"}
    assert request | expected == request
    assert len({request["seed"] for _, _, request in server.seen}) == 24


def test_a_server_is_not_told_of_a_top_k_of_0(server):
    ask(server, sampling=Sampling(top_k=0))
    assert "top_k" not in server.seen[0][2]


def test_a_busy_server_is_asked_again_after_the_time_that_it_names(server):
    answers = [(429, ""), (503, ""), (200, choice(FINE))]
    server.answer = lambda text: answers.pop(0)
    server.headers["Retry-After"] = "60"
    [record] = ask(server)
    assert record["error"] is None
    assert server.pauses == [60, 60]


def test_a_busy_server_that_names_no_time_gets_a_good_minute(server):
    server.answer = lambda text: (429, "")
    with pytest.raises(ValueError, match="Error code: 429"):
        ask(server)
    assert sum(server.pauses) > 60


@pytest.mark.parametrize(
    "answer, reason",
    [
        ((400, '{"error": {"message": "filtered"}}'), "Error code: 400"),
        ((200, choice("Half of", "content_filter")), "reason content_filter"),
        ((200, '{"choices": []}'), "no chat completion"),
        ((200, "<html>"), "no chat completion"),
        ((200, choice([1])), "no content"),
    ],
)
def test_one_query_that_is_refused_for_good_is_recorded(server, tmp_path, answer, reason):
    server.answer = lambda text: answer if "two" in text else (200, choice(FINE))
    records = ask(server, TWO, out=tmp_path / "out")
    assert [record["passages"] is None for record in records] == [False, True]
    assert reason in records[1]["error"]
    more = TWO | {"y": "two y", "z": "two z"}  # now both of a batch are refused
    assert ask(server, more, out=tmp_path / "out")[:2] == records
    assert len(server.seen) == 4


def test_a_batch_that_is_refused_when_asked_again_keeps_its_errors(server):
    answers = [(200, choice("no"))] * 2 + [(400, "")] * 2
    server.answer = lambda text: answers.pop(0)
    records = ask(server, {"a": "one", "b": "two"}, retries=1)
    assert ["400" in record["error"] for record in records] == [True, True]


@pytest.mark.parametrize("status", [302, 401, 403, 404, 400, 500, 503])
def test_what_concerns_all_queries_stops_the_command(server, command, tmp_path, capsys, status):
    body = json.dumps({"error": {"message": "your key sk-secret is\n\x1b[31m wrong"}})
    server.answer = lambda text: (status, body)
    server.headers["Location"] = "/elsewhere"
    message = refused(capsys, *command, "--base-url", server.url)
    assert f"Error code: {status} - your key *** is" in message
    assert message.strip().isprintable()
    assert "sk-secret" not in message
    assert {path for path, _, _ in server.seen} == {"/v1/chat/completions"}
    assert not (tmp_path / "OUT").exists()


def test_a_server_that_is_not_there_stops_the_command(server):
    server.url = "http://127.0.0.1:9/v1"
    with pytest.raises(ValueError, match="Connection error"):
        ask(server)


def test_the_committed_lists_are_what_is_asked_and_read_today():
    pool = [record["query"] for _, record in read_jsonl(AUTHORED)]
    for _, record in read_jsonl(WRITTEN):
        assert record["parameters"]["drawn"] == prompts.draw(record["query"], pool, 1)
        for level, passage in (record["passages"] or {}).items():
            reply = record["reply"][3 - int(level)]
            assert prompts.read_reply("by-level", (level,), reply) == {level: passage}


@pytest.mark.checkpoint
def test_the_built_in_model_writes_what_it_wrote_for_the_committed_lists():
    _, record = next(read_jsonl(WRITTEN))
    options = {"sampling": Sampling(12), "seed": 1}
    model = LocalGenerator("smollm2-135m", "cpu")
    [again] = generate({record["id"]: record["query"]}, model, **options)
    [text] = again["reply"]
    assert len(text.split()) > 5
    assert record["reply"][0].startswith(text)
