"""What generation refuses, in one sentence each, and the server it can talk to."""

import gzip
import http.server
import json
import threading
import time
from pathlib import Path

import pytest
from tiny_lm import FINE, QUERIES, make_model, options

from repro import cache
from repro.data import DataError
from repro.generate import GenerateError, ServerGenerator, choose, generate, main, read_queries


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("lm") / "tiny-lm")


@pytest.fixture(scope="module")
def query_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("queries") / "queries.jsonl"
    path.write_text(
        "".join(json.dumps({"_id": k, "text": q}) + "\n" for k, q in QUERIES.items()), encoding="utf-8"
    )
    return path


def test_query_files(tmp_path):
    rows = {
        "queries.jsonl": '{"_id": "a", "text": " one  two "}\n{"_id": 7, "text": "three"}\n',
        "lists.jsonl": '{"query": "one two", "passages": {}}\n{"query": "three", "id": "z"}\n',
        "q.txt": "one two\n\nthree\n",
    }
    for name, text in rows.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        with gzip.open(tmp_path / f"{name}.gz", "wt", encoding="utf-8") as file:
            file.write(text)
        assert list(read_queries(tmp_path / name).values()) == ["one two", "three"]
        assert read_queries(tmp_path / f"{name}.gz") == read_queries(tmp_path / name)
    assert list(read_queries(tmp_path / "queries.jsonl")) == ["a", "7"]
    assert list(read_queries(tmp_path / "lists.jsonl")) == ["q00001", "z"]
    assert list(read_queries(tmp_path / "q.txt")) == ["q00001", "q00003"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            b'{"_id": "a", "text": "one"}\n{"_id": "a", "text": "two"}\n',
            ":2: field '_id': 'a' stands for an earlier",
        ),
        (
            b'{"_id": "a", "text": "one"}\n{"_id": "b", "text": "One "}\n',
            ":2: field 'text': the same query stands in line 1",
        ),
        (b'{"_id": "a", "text": " "}\n', ":1: field 'text'"),
        (b'{"_id": "a"}\n', ":1: field 'query'"),
        (b"", "found none"),
        (b'{"_id": "a", "text": "caf\xe9"}\n', ":1: expected UTF-8 text, found byte 0xe9"),
        (b"[1]\n", ":1: expected one JSON"),
        (b'{"_id": "a", "text": 5}\n', ":1: field 'text'"),
    ],
)
def test_bad_query_files_are_one_sentence(tmp_path, capsys, content, reason):
    path = tmp_path / "q.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        read_queries(path)
    assert main(["--queries", str(path), "--out", str(tmp_path / "x.jsonl")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and not (tmp_path / "x.jsonl").exists()


def test_choose_is_nested_and_seeded():
    assert (
        set(choose(QUERIES, 5, 1))
        < set(choose(QUERIES, 9, 1))
        < set(choose(QUERIES, None, 1))
        == set(QUERIES)
    )
    assert choose(QUERIES, 5, 1) == choose(dict(QUERIES), 5, 1) != choose(QUERIES, 5, 2)


def refused(capsys, command):
    assert main(command) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("error: ")
    return err


def test_refusals_on_the_command_line(tiny, query_file, tmp_path, capsys):
    out = tmp_path / "x.jsonl"
    base = options(tiny, query_file, out)
    assert main(base) == 0
    before = out.read_bytes()
    assert "was written with temperature 1.0, this run has 0.5" in refused(
        capsys, [*base, "--temperature", "0.5"]
    )
    assert "was written with prompt_sha256" in refused(capsys, [*base, "--example"])
    assert "was written with seed 3, this run has 4" in refused(capsys, [*base, "--seed", "4"])
    changed = tmp_path / "other.txt"
    changed.write_text("word1\n")
    other = tmp_path / "other.jsonl"
    other.write_text('{"_id": "q00", "text": "another text"}\n')
    assert "id 'q00' stands for the query" in refused(capsys, [*base, "--queries", str(other)])
    assert "levels: expected 2, 3, 4 or 5" in refused(capsys, [*base, "--levels", "7"])
    assert "--batch-size '0'" in refused(capsys, [*base, "--batch-size", "0"])
    assert "--limit" in refused(capsys, [*base, "--limit", "0"])
    assert "sampling: expected" in refused(capsys, [*base, "--top-p", "0"])
    assert "unknown model" in refused(capsys, [*base, "--model", "no-such-model"])
    assert "cannot be read" in refused(capsys, [*base, "--queries", str(tmp_path / "none.jsonl")])
    with cache.CacheWriter(out):
        assert "another process is writing" in refused(capsys, base)
    assert out.read_bytes() == before
    other.write_text('{"_id": "long", "text": "' + "word1 " * 1000 + '"}\n')
    assert "query 'long': the prompt has" in refused(
        capsys, [*base, "--queries", str(other), "--out", str(tmp_path / "y")]
    )


def test_a_model_without_chat_template(tmp_path, query_file, capsys):
    plain = make_model(tmp_path / "plain", template=None)
    command = options(plain, query_file, tmp_path / "x.jsonl", "--limit", "2")
    assert "no chat template; use --no-chat-template" in refused(capsys, command)
    assert main([*command, "--no-chat-template"]) == 0
    broken = make_model(tmp_path / "broken", template="{{ raise_exception('system role not supported') }}")
    assert "chat template refuses this prompt: system role" in refused(
        capsys, options(broken, query_file, tmp_path / "y.jsonl")
    )


def test_empty_query_in_python():
    with pytest.raises(GenerateError, match="'q00002': expected text"):
        generate(["word1", "  "], ServerGenerator("http://127.0.0.1:9", "m"))


class Handler(http.server.BaseHTTPRequestHandler):
    """A stand-in for an OpenAI-compatible server; the class attributes script it."""

    script: list = []  # status codes to answer before it works
    seen: list = []
    body: object = None
    lock = threading.Lock()
    running = most = 0

    def do_POST(self):
        cls = type(self)
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with cls.lock:
            cls.running += 1
            cls.most = max(cls.most, cls.running)
            cls.seen.append((self.path, dict(self.headers), request))
            status = cls.script.pop(0) if cls.script else 200
        time.sleep(0.02)
        content = {"choices": [{"message": {"role": "assistant", "content": f"```json\n{FINE}\n```"}}]}
        payload = json.dumps(cls.body if cls.body is not None else content).encode()
        if status != 200:
            payload = b'{"error": "no such thing, key was sk-secret"}'
        with cls.lock:
            cls.running -= 1
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    handler = type("Scripted", (Handler,), {"script": [], "seen": [], "body": None})
    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}/v1", handler
    listening.shutdown()
    listening.server_close()


def test_server_writes_the_same_kind_of_cache(server, query_file, tmp_path, monkeypatch):
    url, handler = server
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    out = tmp_path / "x.jsonl"
    command = [
        "--queries",
        str(query_file),
        "--out",
        str(out),
        "--base-url",
        url,
        "--api-model",
        "big-model",
        "--plan",
        "all-levels",
        "--workers",
        "4",
        "--seed",
        "5",
    ]
    assert main(command) == 0
    records = cache.read_records(out)
    assert len(records) == len(QUERIES) and all(record["passages"]["3"] == "text 3" for record in records)
    assert records[0]["generator"] == "big-model" and b"sk-secret" not in out.read_bytes()
    path, headers, request = handler.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer sk-secret"
    assert request["model"] == "big-model" and request["max_tokens"] == 400 and request["temperature"] == 0.7
    assert [turn["role"] for turn in request["messages"]] == ["system", "user"]
    assert len({request["seed"] for _, _, request in handler.seen}) == len(QUERIES)
    assert 2 <= handler.most <= 4
    handler.seen.clear()
    assert main(command) == 0 and handler.seen == []


def test_server_busy_is_tried_again(server):
    url, handler = server
    handler.script[:] = [429, 503, 500]
    model = ServerGenerator(url, "m", workers=1, pause=0.01)
    assert generate(["one"], model, plan="all-levels")[0]["passages"]["0"] == "text 0"
    assert len(handler.seen) == 4 and len({json.dumps(request) for _, _, request in handler.seen}) == 1


@pytest.mark.parametrize(
    ("script", "body", "reason"),
    [
        ([401], None, "after 1 tries, status 401.*key was \\*\\*\\*"),
        ([503] * 9, None, "after 3 tries, status 503"),
        ([], {"choices": []}, "not a chat completion: IndexError"),
        ([], [1], "not a chat completion: TypeError"),
        ([], {"choices": [{"message": {"content": None}}]}, "no text in the reply"),
    ],
)
def test_server_errors_are_one_sentence(server, monkeypatch, script, body, reason):
    url, handler = server
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    handler.script[:], handler.body = script, body
    model = ServerGenerator(url, "m", workers=2, pause=0.01, tries=3)
    with pytest.raises(GenerateError, match=reason) as caught:
        generate(["one"], model, plan="all-levels")
    assert "sk-secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_no_server_there(server):
    url, _ = server
    with pytest.raises(
        GenerateError, match="http://127.0.0.1:9/chat/completions: gave no reply after 2 tries, no answer"
    ):
        generate(["one"], ServerGenerator("http://127.0.0.1:9", "m", tries=2, pause=0.01), plan="all-levels")
    with pytest.raises(GenerateError, match="expected an address"):
        ServerGenerator("localhost:8000", "m")
