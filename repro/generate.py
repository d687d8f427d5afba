"""Write graded passages for queries: prompts in, one JSON record a query out.

A reply's random numbers depend on (seed, query id, attempt, levels) alone, never on its neighbours in the
batch.  Records are appended batch by batch, so a run that was stopped goes on with the same command: a batch
that was half written is made again whole, and only its missing records are added.
"""

import argparse
import hashlib
import http.client
import json
import os
import random
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor

from repro import files, prompts
from repro.checkpoints import load_pretrained, pick_device, pick_dtype

Chat, Record = list[dict[str, str]], dict[str, Any]
Job, Tick = tuple[Chat, str], Callable[[int], object]  # what is asked, and the name that seeds its reply
FIELDS = ("id", "query", "prompt_version", "prompt_sha256", "plan", "generator", "parameters", "seed")
FIELDS += ("attempt", "reply", "passages", "error")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: `top_k` 0 means from all tokens, temperature 0 the likeliest one."""

    max_new_tokens: int = 100
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 50

    def __post_init__(self) -> None:
        is_good = 0 <= self.temperature < float("inf") and 0 < self.top_p <= 1 and self.top_k >= 0
        if not is_good or self.max_new_tokens < 1:
            raise ValueError(f"expected max_new_tokens >= 1, temperature, top_k >= 0, 0 < top_p <= 1: {self}")


def seed_of(name: str) -> int:
    """A seed below 2^63 that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


class RowSampler(LogitsProcessor):
    """Leaves one token a row possible: the one drawn with that row's own numbers, noise (B, new tokens).

    Inverse-CDF sampling from the `top_k` likeliest tokens, of these the fewest whose mass reaches `top_p`.
    tick: is told at each step how many rows had not ended (a row that has ends with `pad`).
    """

    def __init__(self, noise: Tensor, sampling: Sampling, pad: int, tick: Tick) -> None:
        self.columns, self.sampling, self.pad, self.tick = iter(noise.T), sampling, pad, tick

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Token ids so far (B, L), logits (B, V) -> 0 at the drawn token, -inf elsewhere (B, V)."""
        self.tick(int((input_ids[:, -1] != self.pad).sum()))
        if self.sampling.temperature == 0:
            return scores
        values, tokens = scores.topk(min(self.sampling.top_k or scores.shape[-1], scores.shape[-1]))
        mass = (values / self.sampling.temperature).softmax(-1).double()  # (B, top_k), likeliest first
        kept = mass.cumsum(-1) - mass < self.sampling.top_p
        cumulative = torch.where(kept, mass, 0.0).cumsum(-1)
        drawn = (cumulative <= next(self.columns)[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
        drawn = drawn.minimum(kept.sum(-1, keepdim=True) - 1)  # rounding must not step past the kept tokens
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens.gather(-1, drawn), 0.0)


class LocalGenerator:
    """A causal language model on this machine, by built-in name, folder or hub id.

    batch_size: prompts a batch; None: what 60 % of the free memory holds.  plain: without a chat template.
    """

    def __init__(
        self, name: str = "smollm2-135m", device: str = "auto", dtype: str = "auto",
        batch_size: int | None = None, plain: bool = False,
    ) -> None:  # fmt: skip
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"--batch-size {batch_size}: expected auto or a number of 1 or more")
        self.name = Path(name).name if Path(name).is_dir() else name  # no machine's folders in the records
        self.device, self.batch_size, self.plain = pick_device(device), batch_size, plain
        number_format, self.most = pick_dtype(dtype, self.device), sys.maxsize
        self.tokenizer = load_pretrained(name, AutoTokenizer)
        if not plain and not self.tokenizer.chat_template:
            raise ValueError(f"{name}: the tokenizer has no chat template; use --no-chat-template")
        self.model = load_pretrained(name, AutoModelForCausalLM, dtype=number_format).to(self.device).eval()
        ends = self.model.generation_config.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id} - {None}
        # Nothing else of the model's own generation settings stays: a record names all settings there are.
        own = GenerationConfig(eos_token_id=sorted(ends) or None, pad_token_id=min(ends, default=0))
        self.model.generation_config, self.config = own, self.model.config.get_text_config()
        self.context = getattr(self.config, "max_position_embeddings", None) or sys.maxsize

    def prompt(self, chat: Chat) -> list[int]:
        """Token ids of a chat, ready for the model's turn."""
        if self.plain:
            return self.tokenizer("\n\n".join(turn["content"] for turn in chat) + "\n\n")["input_ids"]
        try:
            return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # the template is a program that came with the model
            raise ValueError(f"{self.name}: its chat template refuses this prompt: {error}") from error

    def rows(self, longest: int, sampling: Sampling) -> int:
        """How many prompts of `longest` tokens make a batch; keys and values count twice, as they grow."""
        width = self.config.num_hidden_layers * self.config.hidden_size * self.model.dtype.itemsize
        row = 4 * width * (longest + sampling.max_new_tokens) + 16 * self.config.vocab_size
        on_cuda, most = self.device.type == "cuda", 64 if self.device.type == "cpu" else 256
        free = torch.cuda.mem_get_info(self.device)[0] if on_cuda else psutil.virtual_memory().available
        return self.batch_size or max(1, min(most, int(0.6 * free / row)))

    @torch.inference_mode()
    def reply(self, jobs: Sequence[Job], sampling: Sampling, tick: Tick) -> list[str]:
        """One reply a job, through transformers' own loop, as one batch that is padded on the left.

        If memory runs out the batch is halved, with a notice, down to one prompt; then ValueError.
        """
        if len(jobs) > self.most:
            rest = self.reply(jobs[self.most :], sampling, tick)
            return self.reply(jobs[: self.most], sampling, tick) + rest
        ids, pad = [self.prompt(chat) for chat, _ in jobs], self.model.generation_config.pad_token_id
        longest, size = max(map(len, ids)), sampling.max_new_tokens
        padded = torch.tensor([[pad] * (longest - len(row)) + row for row in ids], device=self.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=self.device)
        seeds = [torch.Generator().manual_seed(seed_of(name)) for _, name in jobs]
        noise = torch.stack([torch.rand(size, generator=seed, dtype=torch.float64) for seed in seeds])
        options = {"logits_processor": [RowSampler(noise.to(self.device), sampling, pad, tick)]}
        try:
            made = self.model.generate(padded, attention_mask=mask, max_new_tokens=size, **options)
            return self.tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not re.search("(out of|allocate) memory", str(error)):
                raise
            if len(jobs) == 1:
                raise ValueError(f"{self.name}: memory ran out with a single prompt") from error
        torch.cuda.empty_cache()
        self.most = (len(jobs) + 1) // 2
        print(f"memory ran out with {len(jobs)} prompts; going on with {self.most}", file=sys.stderr)
        return self.reply(jobs, sampling, tick)


load_generator = LocalGenerator


class ServerGenerator:
    """A model behind an OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1; its key is OPENAI_API_KEY.

    Not through huggingface_hub's client: that follows redirects, reads replies of any size, sends a stored
    hub token where there is no key, and refuses to work under HF_HUB_OFFLINE.
    """

    timeout, most = 120.0, 4_000_000  # seconds, bytes of a reply

    def __init__(self, url: str, model: str, workers: int = 8, tries: int = 5, pause: float = 1.0) -> None:
        host = r"([\w.-]+|\[[\da-f:.]+\])(:\d{1,5})?"
        if not re.fullmatch(rf"https?://{host}(/[\w.~/-]*)?", url, re.ASCII) or workers < 1:
            expected = "http(s)://HOST:PORT/v1 without user, password or query, and 1 or more --workers"
            raise ValueError(f"--base-url: expected {expected}")
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not re.fullmatch(r"[\w.~+/=:-]*", self.key, re.ASCII):  # so that every message shows it alike
            raise ValueError("OPENAI_API_KEY: expected a key of letters, digits and . ~ + / = : - _")
        self.name, self.url = model, url.rstrip("/") + "/chat/completions"
        self.workers, self.tries, self.pause, self.stopped = workers, tries, pause, threading.Event()
        self.context, self.prompt, self.rows = sys.maxsize, str, lambda *_: 2 * workers  # see LocalGenerator

    def reply(self, jobs: Sequence[Job], sampling: Sampling, tick: Tick) -> list[str]:
        """One reply a job, `workers` requests at a time.  ValueError if one fails for good."""
        self.stopped.clear()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                return list(pool.map(lambda job: self.one(*job, sampling), jobs))
            except BaseException:
                self.stopped.set()
                raise

    def one(self, chat: Chat, name: str, sampling: Sampling) -> str:
        """One request; repeated with growing pauses on 429, 5xx, lost connections and broken replies."""
        body = {"model": self.name, "messages": chat, "seed": seed_of(name) % 2**31, "top_p": sampling.top_p}
        body |= {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        headers |= {"Content-Type": "application/json"}
        url, reason, attempt = urlsplit(self.url), "it was stopped", 0
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        while attempt < self.tries and not self.stopped.wait(attempt and self.pause * 2 ** (attempt - 1)):
            attempt += 1
            try:
                with closing(kind(url.netloc, timeout=self.timeout)) as connection:
                    connection.request("POST", url.path, json.dumps(body), headers)
                    response = connection.getresponse()
                    raw = response.read(self.most + 1)
                if response.status == 200 and len(raw) <= self.most:
                    text = json.loads(raw)["choices"][0]["message"]["content"]
                    return text.encode("utf-8", "replace").decode()  # a lone surrogate is no text
                shown = raw[:100_000].decode("utf-8", "replace")
                reason = f"status {response.status}, {len(raw)} bytes: {shown}"
                if response.status != 429 and response.status < 500:
                    break
            except (OSError, http.client.HTTPException) as error:
                reason = f"no answer: {error!r}"
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                reason = f"the reply is no chat completion: {error!r}"
        reason = files.one_line(reason.replace(self.key or "\0", "***"))
        raise ValueError(f"{self.url}: gave no reply after {attempt} tries, {reason}")


def read_queries(path: str | Path) -> dict[str, str]:
    """{id: query} from a BEIR queries file (`_id`, `text`), graded lists (`query`, optional `id`) or a .txt.

    A .txt has one query a line; all may be .gz.  Without an id, line 7 is `q00007`.  Raises ValueError for
    an empty query, or an id or query that stands there twice, naming file and line.
    """
    lines = ((where, {"query": line}) for where, line in files.read_lines(path))
    queries: dict[str, str] = {}
    seen: dict[str, str] = {}
    for where, row in lines if ".txt" in Path(path).suffixes[-2:] else files.read_jsonl(path):
        field = "text" if "query" not in row and "text" in row else "query"
        query = " ".join(files.text_field(row, field, where).split())
        name = next((name for name in ("_id", "id") if name in row), None)
        key = files.text_field(row, name, where) if name else f"q{int(where.rpartition(':')[2]):05d}"
        if key in queries:
            raise ValueError(f"{where}: field {name!r}: {key!r} stands for an earlier query already")
        if (first := seen.setdefault(query.lower(), where)) != where:
            raise ValueError(f"{where}: field {field!r}: the same query stands in {first}")
        queries[key] = query
    if not queries:
        raise ValueError(f"{path}: expected queries, found none")
    return queries


def read_records(path: Path) -> tuple[list[Record], int]:
    """(the records of a file of this command, the bytes of its whole lines); a torn last line is left out.

    Raises ValueError if anything else stands there, also for a torn line alone: such a file is not this
    command's (see `append`) and must stay as it is.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: expected a file, to be continued if the run is stopped")
    raw, records = path.read_bytes() if path.exists() else b"", []
    *lines, torn = raw.split(b"\n")
    for number, line in enumerate(lines or [b"torn"] * bool(torn), start=1):
        try:
            records.append(json.loads(line))
            is_record = set(FIELDS) <= set(records[-1]) and isinstance(records[-1]["parameters"], dict)
        except (ValueError, TypeError, RecursionError):
            is_record = False
        if not is_record:
            raise ValueError(f"{path}:{number}: expected a record of this command; name another --out")
    return records, len(raw) - len(torn)


def append(path: Path, records: Sequence[Record]) -> None:
    """Add records to a file and wait until they are on the disk; a new file appears with all of them.

    Raises ValueError if the disk is full; the file then keeps what it had.
    """
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if not path.exists() or path.stat().st_size == 0:
        with files.writing(path) as sink:
            sink.write(text)
        return
    with open(path, "ab", buffering=0) as file:
        before, rest = os.fstat(file.fileno()).st_size, text.encode()
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError as error:
            os.ftruncate(file.fileno(), before)
            raise ValueError(f"{path}: writing failed ({error.strerror}); its records are kept") from error


def generate(
    queries: Sequence[str] | Mapping[str, str], generator: Any, *, plan: str = "by-level", seed: int = 0,
    retries: int = 0, sampling: Sampling | None = None, out: str | Path | None = None,
    pool: Sequence[str] | None = None, progress: bool = False, shard: tuple[int, int] = (0, 1),
) -> list[Record]:  # fmt: skip
    """One record a query, in the order of `queries`; with `shard` (i, n), i = 0 ... n-1, of that part only.

    queries: texts, or {id: text}; pool: where unrelated queries are drawn from (default: `queries`).  A reply
    that cannot be read gives a record with `passages` None and the reason in `error`, and is asked again up
    to `retries` times with new seeds.  With `out` the records go into that file, and those already there
    are not made again.  Raises ValueError, before any work, for settings, queries or a file that do not fit.
    """
    if not isinstance(queries, Mapping):
        queries = {f"q{number:05d}": query for number, query in enumerate(queries, start=1)}
    if retries < 0 or not 0 <= shard[0] < shard[1]:
        raise ValueError("expected retries >= 0 and a shard (i, n) with 0 <= i < n")
    queries = {key: query.strip() for key, query in queries.items()}
    if empty := [key for key, query in queries.items() if not query]:
        raise ValueError(f"query {empty[0]!r}: expected text, found it empty")
    sampling = sampling or Sampling(max_new_tokens=400 if plan == "all-levels" else 100)
    parameters = {"levels": list(prompts.LEVELS), "example": False, **asdict(sampling)}
    settings = {"prompt_version": prompts.PROMPT_VERSION, "prompt_sha256": prompts.prompt_sha256(plan)}
    settings |= {"plan": plan, "generator": generator.name, "parameters": parameters, "seed": seed}
    calls, pool = prompts.calls(plan), list(pool or queries.values())
    drawn = {key: {} if plan == "all-levels" else prompts.draw(queries[key], pool, seed) for key in queries}

    def chat(key: str, asked: tuple[int, ...]) -> Chat:
        return prompts.messages(plan, asked, queries[key], drawn[key])

    lengths = {key: max(len(generator.prompt(chat(key, asked))) for asked in calls) for key in queries}
    for key, length in lengths.items():
        if length + sampling.max_new_tokens > generator.context:
            too_many = f"{length} tokens and {sampling.max_new_tokens} new ones exceed {generator.context}"
            raise ValueError(f"query {key!r}: does not fit into the model's context: {too_many}")
    order = sorted(queries, key=lambda key: (-lengths[key], key))[shard[0] :: shard[1]]
    rows = generator.rows(max(lengths.values(), default=1), sampling)

    def ask(keys: Sequence[str], attempt: int) -> Iterator[Record]:
        """A record for each of these queries; one with a reply that cannot be read is asked no further."""
        made: dict[str, Record] = {key: {"reply": [], "passages": {}, "error": None} for key in keys}
        for asked in calls:
            going = [key for key in keys if not made[key]["error"]]
            jobs = [(chat(key, asked), f"{seed}|{key}|{attempt}|{asked}") for key in going]
            texts = generator.reply(jobs, sampling, bar.update) if jobs else []
            for key, text in zip(going, texts, strict=True):
                made[key]["reply"].append(text)
                try:
                    found = prompts.read_reply(plan, asked, text)
                    made[key]["passages"] |= {str(level): passage for level, passage in found.items()}
                except prompts.ReplyError as error:
                    made[key]["error"] = str(error)
        for key, row in made.items():
            row["passages"] = None if row["error"] else row["passages"]
            row["reply"] = row["reply"][0] if plan == "all-levels" else row["reply"]
            own = settings | {"parameters": parameters | {"drawn": drawn[key]}}
            yield {"id": key, "query": queries[key], **own, "attempt": attempt, **row}

    path = None if out is None else files.checked_output(out, lambda line: True)
    bar = tqdm(unit=" tokens", disable=not progress, mininterval=1.0, delay=1.0)
    with bar, files.locked(path) if path else nullcontext():
        records, whole = read_records(path) if path else ([], 0)
        for record in records:
            old = record | record["parameters"]
            same = {"query": queries.get(record["id"], record["query"]), "drawn": old.get("drawn")}
            new = settings | parameters | same | {"parameters": record["parameters"]}
            for name in [*new, *record["parameters"]]:
                if old.get(name) != new.get(name):
                    change = f"{name} {old.get(name)!r}, this run has {new.get(name)!r}"
                    raise ValueError(f"{path}: was written with {change} (record {record['id']!r})")
        if path and path.exists() and whole < path.stat().st_size:
            print(f"{path}: dropped an incomplete last line", file=sys.stderr)
            os.truncate(path, whole)
        fine = {(record["id"], record["attempt"]): record["passages"] is not None for record in records}
        for attempt in range(retries + 1):
            todo = [key for key in order if attempt == 0 or fine.get((key, attempt - 1)) is False]
            for keys in (todo[start : start + rows] for start in range(0, len(todo), rows)):
                if all((key, attempt) in fine for key in keys):
                    continue
                made = [record for record in ask(keys, attempt) if (record["id"], attempt) not in fine]
                if path:
                    append(path, made)
                records += made
                fine |= {(record["id"], attempt): record["passages"] is not None for record in made}
                bar.set_postfix_str(f"{len(fine)} records", refresh=False)
    records.sort(key=lambda record: record["passages"] is not None)  # a good one counts before a failed one
    best, part = {record["id"]: record for record in records}, set(order)
    return [best[key] for key in queries if key in part]


def main(argv: list[str] | None = None) -> int:
    """Command line of the module; see --help."""
    text = "Write graded passages for queries.  A run that was stopped goes on with the same command."
    parser = argparse.ArgumentParser(prog="python -m repro.generate", description=text)
    add = parser.add_argument
    add("--queries", default=str(files.AUTHORED), help="queries.jsonl, graded lists or .txt, also .gz")
    add("--out", required=True, help="file to append records to; parts are joined with `cat`")
    add("--model", default="smollm2-135m", help="built-in name, folder or hub id (default %(default)s)")
    add("--plan", choices=prompts.PLANS, default="by-level", help="default %(default)s")
    add("--seed", type=int, default=0)
    add("--limit", type=int, help="only so many queries, drawn with the seed")
    add("--shard", default="1/1", metavar="I/N", help="only the I-th of N parts of the queries")
    add("--retries", type=int, default=0, help="ask so often again where a reply cannot be read")
    for name, value in asdict(Sampling()).items():
        note = " (all-levels: 400)" if name == "max_new_tokens" else ""
        add("--" + name.replace("_", "-"), type=type(value), help=f"default {value}{note}")
    size = {"type": lambda text: None if text == "auto" else int(text)}
    add("--batch-size", **size, help="prompts a batch, or auto (the default): as many as memory holds")
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--no-chat-template", action="store_true", help="send the prompt as plain text")
    add("--base-url", help="an OpenAI-compatible server instead, e.g. http://127.0.0.1:8000/v1")
    add("--api-model", help="the model's name on that server (default: --model)")
    add("--workers", type=int, default=8, help="requests under way at a time (default %(default)s)")
    a = parser.parse_args(argv)

    def work() -> None:
        part = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", a.shard)
        is_queries = Path(a.out).resolve() == Path(a.queries).resolve()
        for is_bad, message in (
            (not part or int(part[1]) > int(part[2]), "--shard: expected I/N with 1 <= I <= N"),
            (a.limit is not None and a.limit < 1, "--limit: expected 1 or more"),
            (a.retries < 0, "--retries: expected 0 or more"),
            (a.base_url and a.top_k is not None, "--top-k: is not part of the protocol of --base-url"),
            (is_queries, "--out: is the file of --queries"),
            (a.out.endswith(".gz"), "--out: is plain text, which a name in .gz would deny"),
        ):
            if is_bad:
                raise ValueError(message)
        chosen = {"max_new_tokens": 400 if a.plan == "all-levels" else 100, "top_k": 0 if a.base_url else 50}
        chosen |= {name: getattr(a, name) for name in vars(Sampling()) if getattr(a, name) is not None}
        sampling, everything = Sampling(**chosen), read_queries(a.queries)
        keys = list(everything)
        random.Random(a.seed).shuffle(keys)
        kept = set(keys[: a.limit])  # a larger limit contains a smaller one
        read_records(files.checked_output(a.out, lambda line: True))  # refused before a model is loaded
        if a.base_url:
            generator: Any = ServerGenerator(a.base_url, a.api_model or a.model, a.workers)
        else:
            generator = LocalGenerator(a.model, a.device, a.dtype, a.batch_size, a.no_chat_template)
        queries = {key: query for key, query in everything.items() if key in kept}
        options = {"plan": a.plan, "seed": a.seed, "retries": a.retries, "sampling": sampling, "out": a.out}
        options |= {"pool": list(everything.values()), "shard": (int(part[1]) - 1, int(part[2]))}
        records = generate(queries, generator, progress=True, **options)
        failed = [f"{record['id']}: {record['error']}" for record in records if record["passages"] is None]
        print(f"{a.out}: {len(records) - len(failed)} of {len(records)} queries have passages")
        if failed:
            print(f"{len(failed)} failed, for example {files.one_line(failed[0])}", file=sys.stderr)

    return files.ending(work)


if __name__ == "__main__":
    sys.exit(main())
