"""Write graded passages for queries: prompts in, one JSON record a query out.

A reply's random numbers depend on (seed, query id, attempt, levels) alone. Records are appended batch by
batch; after a stop the same command makes a half-written batch again, whole, and adds what is missing.
"""

import argparse
import hashlib
import json
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx2  # huggingface_hub's
import torch
from huggingface_hub import InferenceClient
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from repro import checkpoints, prompts
from repro.checkpoints import checked_output, ending, load_pretrained, locked, one_line, pick_dtype, writing
from repro.data import AUTHORED, read_jsonl, read_lines, text_field

Chat, Record = list[dict[str, str]], dict[str, Any]
Jobs = Sequence[tuple[Chat, str]]  # what is asked, and the name that seeds its reply
FIELDS = ("id", "query", "prompt_version", "prompt_sha256", "plan", "generator", "parameters", "seed",
          "attempt", "reply", "passages", "error")
LIMIT = 4_000_000  # bytes of a server's reply

@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: `top_k` 0 means from all tokens, temperature under 1e-6 the likeliest one."""

    max_new_tokens: int = 100  # a passage asked for: a reply of `all-levels` may have four times as many
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 50

    def __post_init__(self) -> None:
        if not (self.top_k >= 0 <= self.temperature < 1e9 and 0 < self.top_p <= 1 <= self.max_new_tokens):
            raise ValueError(f"expected max_new_tokens >= 1, temperature, top_k >= 0, 0 < top_p <= 1: {self}")

def seed_of(name: str) -> int:
    """A seed below 2^63 that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1

def draw_tokens(scores: torch.Tensor, noise: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits (B, V) -> 0 at the token that a row draws with its noise (B,) in [0, 1), else -inf."""
    values, tokens = scores.topk(min(sampling.top_k or scores.shape[-1], scores.shape[-1]))
    mass = (values / sampling.temperature).softmax(-1).double()  # (B, top_k), likeliest first
    kept = mass.cumsum(-1) - mass < sampling.top_p
    cumulative = torch.where(kept, mass, 0.0).cumsum(-1)
    drawn = (cumulative <= noise[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)  # inverse CDF
    drawn = drawn.minimum(kept.sum(-1, keepdim=True) - 1)  # rounding must not step past the kept tokens
    return torch.full_like(scores, -torch.inf).scatter_(1, tokens.gather(-1, drawn), 0.0)

class LocalGenerator:
    """A local causal language model, by built-in name, folder or hub id; plain: without a chat template."""

    def __init__(self, name: str = "smollm2-135m", device: str = "auto", dtype: str = "auto",
                 batch_size: int = 64, plain: bool = False) -> None:
        self.name = Path(name).name if Path(name).is_dir() else name  # no machine's folders in the records
        self.device, self.batch_size, self.plain = checkpoints.pick_device(device), batch_size, plain
        number_format = pick_dtype(dtype, self.device)
        self.tokenizer = load_pretrained(name, AutoTokenizer)
        self.model = load_pretrained(name, AutoModelForCausalLM, dtype=number_format).to(self.device).eval()
        self.context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 10**9
        ends = self.model.generation_config.eos_token_id  # all that stays: a record names all settings
        ends = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id} - {None} or {-1}
        self.model.generation_config = GenerationConfig(eos_token_id=sorted(ends), pad_token_id=min(ends))

    def prompt(self, chat: Chat) -> list[int]:
        """Token ids of a chat, ready for the model's turn."""
        if self.plain:
            return self.tokenizer("\n\n".join(turn["content"] for turn in chat) + "\n\n")["input_ids"]
        try:
            return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # there is none, or it refuses a role: it is the model's
            raise ValueError(f"{self.name}: its chat template fails; --no-chat-template? {error}") from error

    @torch.inference_mode()
    def reply(self, jobs: Jobs, sampling: Sampling) -> list[str]:
        """One reply a job, as one batch that is padded on the left.  ValueError if memory runs out."""
        ids, size = [torch.tensor(self.prompt(chat)) for chat, _ in jobs], sampling.max_new_tokens
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1, padding_side="left")
        ids, seeds = ids.to(self.device), [torch.Generator().manual_seed(seed_of(name)) for _, name in jobs]
        noise = torch.stack([torch.rand(size, generator=seed, dtype=torch.float64) for seed in seeds], dim=1)
        home = "cpu" if self.device.type == "mps" else self.device  # Apple's GPUs lack float64
        noise, mask = iter(noise.to(home)), (ids >= 0).long()

        def draw(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return draw_tokens(scores.to(home), next(noise), sampling).to(scores.device)

        try:
            made = self.model.generate(ids.clamp(min=0), attention_mask=mask, max_new_tokens=size,
                                       logits_processor=[draw] if sampling.temperature >= 1e-6 else [])
        except torch.OutOfMemoryError as error:
            raise ValueError(f"memory ran out with {len(jobs)} prompts; lower --batch-size") from error
        return self.tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)

class OneReply(InferenceClient):
    """A client that follows no redirect with the key, takes no proxy, and reads no more than LIMIT bytes."""

    def _inner_post(self, asked: Any, *, stream: bool = False) -> bytes:
        with self.http.stream("POST", asked.url, json=asked.json, headers=asked.headers) as response:
            body = b""
            for part in response.iter_raw():
                if len(body := body + part) > LIMIT:
                    raise httpx2.ReadError(f"the reply has more than {LIMIT} bytes")
            status, request = response.status_code, response.request
        return httpx2.Response(status, content=body, request=request).raise_for_status().content

class ServerGenerator:
    """A model behind an OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1; key: OPENAI_API_KEY."""

    def __init__(self, url: str, model: str, workers: int = 8) -> None:
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()  # a plain word: every message shows it alike
        is_url = re.fullmatch(r"https?://([\w.-]+|\[[\da-f:.]+\])(:\d{1,5})?(/[\w.~/-]*)?", url, re.ASCII)
        if not is_url or not re.fullmatch(r"[\w.~+/=:-]*", self.key, re.ASCII):
            raise ValueError("expected --base-url http(s)://HOST:PORT/v1 and, if any, a plain OPENAI_API_KEY")
        self.name, self.workers, self.batch_size, self.tries, self.pause = model, workers, 2 * workers, 5, 1.0
        self.url, self.context, self.prompt = url.rstrip("/") + "/chat/completions", 10**9, str
        headers = {"Accept-Encoding": "identity"}  # LIMIT is of plain bytes; if no key, not the hub's
        self.client = OneReply(base_url=self.url, api_key=self.key or "EMPTY", headers=headers)
        transport = httpx2.HTTPTransport(limits=httpx2.Limits())  # as many connections as there are workers
        self.client.http = httpx2.Client(transport=transport, timeout=120)

    def reply(self, jobs: Jobs, sampling: Sampling) -> list[str]:
        """One reply a job, `workers` requests at a time.  ValueError if one fails for good."""
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda job: self.one(*job, sampling), jobs))

    def one(self, chat: Chat, name: str, sampling: Sampling) -> str:
        """One request; repeated with growing pauses on 429, 5xx, lost connections and broken replies."""
        more = {"top_k": sampling.top_k} if sampling.top_k else None  # not in the protocol, but widely known
        for attempt in range(self.tries):
            time.sleep(attempt and self.pause * 2 ** (attempt - 1))
            try:
                done = self.client.chat_completion(
                    chat, model=self.name, max_tokens=sampling.max_new_tokens, seed=seed_of(name) % 2**31,
                    temperature=sampling.temperature, top_p=sampling.top_p, extra_body=more)
                return done.choices[0].message.content.encode(errors="replace").decode()  # no lone surrogate
            except httpx2.HTTPStatusError as error:
                reason = f"status {(status := error.response.status_code)}: {error.response.text}"
                if status != 429 and status < 500:
                    break
            except Exception as error:  # of the network, the protocol, or a body that is no chat completion
                reason = f"no chat completion: {error!r}"
        reason = one_line(reason.replace(self.key or "\0", "***"))
        raise ValueError(f"{self.url}: gave no reply after {attempt + 1} tries, {reason}")

def read_queries(path: str | Path) -> dict[str, str]:
    """{id: query} of a BEIR queries file, of graded lists, or of a .txt with one query a line; also .gz.
    Without an id, line 7 is `q00007`. ValueError, with the line, for an empty query, or it or an id twice."""
    lines = ((where, {"query": line}) for where, line in read_lines(path))
    queries, seen = {}, {}
    for where, row in lines if ".txt" in Path(path).suffixes[-2:] else read_jsonl(path):
        query = " ".join(text_field(row, "query" if "query" in row else "text", where).split())
        name = "_id" if "_id" in row else "id"
        key = text_field(row, name, where) if name in row else f"q{int(where.rpartition(':')[2]):05d}"
        if key in queries or seen.setdefault(query.lower(), key) != key:
            raise ValueError(f"{where}: the id {key!r} or its query stands for an earlier query already")
        queries[key] = query
    if not queries:
        raise ValueError(f"{path}: expected queries, found none")
    return queries

def read_records(path: Path) -> tuple[list[Record], int]:
    """(records, bytes of whole lines) of a file of this command.  ValueError for any other, or a device."""
    raw = path.read_bytes() if path.is_file() else b"?" * path.exists()
    whole = raw.rfind(b"\n") + 1
    lines = raw[:whole].splitlines() or [b""] * bool(raw)  # a torn line alone: a first batch appears whole
    try:
        return [{field: row[field] for field in FIELDS} for row in map(json.loads, lines)], whole
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: expected records of this command alone; name another --out") from error

def _check_same(record: Record, settings: dict[str, Any], where: str) -> None:
    there = record | record["parameters"] | {"parameters": settings["parameters"]}
    if wrong := [name for name in settings if there.get(name) != settings[name]]:
        change = f"{wrong[0]} {there.get(wrong[0])!r}, this run has {settings[wrong[0]]!r}"
        raise ValueError(f"{where}: was written with {change}")

def _ask(generator: Any, batch: list[Record], plan: str, sampling: Sampling) -> None:
    """Fill in reply, passages and error of a batch.  After a reply that cannot be read a query is left."""
    for asked in prompts.calls(plan):
        going = [record for record in batch if not record["error"]]
        jobs = [(prompts.messages(plan, asked, record["query"], record["parameters"]["drawn"]),
                 f"{record['seed']}|{record['id']}|{record['attempt']}|{asked}") for record in going]
        for record, text in zip(going, jobs and generator.reply(jobs, sampling), strict=True):
            record["reply"] = text if plan == "all-levels" else [*record["reply"], text]
            try:
                found = prompts.read_reply(plan, asked, text)
                record["passages"] |= {str(level): found[level] for level in asked}
            except prompts.ReplyError as error:
                record |= {"passages": None, "error": str(error)}

def generate(queries: Sequence[str] | Mapping[str, str], generator: Any, *, plan: str = "by-level",
             seed: int = 0, retries: int = 0, sampling: Sampling = Sampling(), out: Path | str | None = None,
             pool: Sequence[str] = (), shard: tuple[int, int] = (0, 1), progress: bool = False) -> list[dict]:
    """One record a query (text, or {id: text}), in their order; with `shard` (i, n), 0 <= i < n, of a part.

    A reply that cannot be read gives `passages` None and the reason in `error`; it is asked again, up to
    `retries` times, with new seeds. What is in the file `out` is not made again. Unrelated queries are drawn
    from `pool` (default: `queries`). Raises ValueError, before any work, for what does not fit."""
    items = queries.items() if isinstance(queries, Mapping) else enumerate(queries, start=1)
    queries = {key if isinstance(key, str) else f"q{key:05d}": query.strip() for key, query in items}
    calls, rows, pool = prompts.calls(plan), generator.batch_size, list(pool or queries.values())
    if min(retries, rows - 1, shard[0], shard[1] - shard[0] - 1) < 0 or not all(queries.values()):
        raise ValueError("expected text in all queries, retries >= 0, batch size >= 1, 0 <= i < n in shard")
    sampling = replace(sampling, max_new_tokens=sampling.max_new_tokens * len(calls[0]))
    parameters = {"levels": list(prompts.LEVELS), "example": False, **asdict(sampling)}
    settings = {"prompt_version": prompts.PROMPT_VERSION, "prompt_sha256": prompts.prompt_sha256(plan),
                "plan": plan, "generator": generator.name, "parameters": parameters, "seed": seed}
    own = {key: parameters | {"drawn": {} if plan == "all-levels" else prompts.draw(query, pool, seed)}
           for key, query in queries.items()}
    lengths = {key: max(len(generator.prompt(prompts.messages(plan, asked, queries[key], own[key]["drawn"])))
                        for asked in calls) for key in queries}
    if large := [key for key in queries if lengths[key] + sampling.max_new_tokens > generator.context]:
        raise ValueError(f"query {large[0]!r}: does not fit into the model's {generator.context} tokens")
    order = dict.fromkeys(sorted(queries, key=lambda key: (-lengths[key], key))[shard[0] :: shard[1]])
    out = None if out is None else checked_output(out, lambda line: True)
    with locked(out) if out else nullcontext():
        records, whole = read_records(out) if out else ([], 0)
        for record in records:
            query = queries.get(record["id"], record["query"])
            _check_same(record, {**settings, **parameters, "query": query}, f"{out}, record {record['id']!r}")
        if out and out.exists():
            os.truncate(out, whole)  # a record that a kill tore is made again
        done = {(record["id"], record["attempt"]): record for record in records}
        for attempt in range(retries + 1):
            todo = [key for key in order if not attempt or done.get((key, attempt - 1), {}).get("error")]
            parts = (todo[start : start + rows] for start in range(0, len(todo), rows))
            parts = [keys for keys in parts if not all((key, attempt) in done for key in keys)]
            for keys in tqdm(parts, f"attempt {attempt}", unit="batch", disable=not progress, delay=1.0):
                made = {key: {"id": key, "query": queries[key], **settings, "parameters": own[key],
                              "attempt": attempt, "reply": [], "passages": {}, "error": None} for key in keys}
                _ask(generator, list(made.values()), plan, sampling)
                new = {(key, attempt): made[key] for key in keys if (key, attempt) not in done}
                if out:
                    with open(out, "a", encoding="utf-8", newline="\n") if done else writing(out) as f:
                        f.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in new.values())
                done |= new
    best = {r["id"]: r for r in sorted(done.values(), key=lambda r: r["passages"] is not None)}
    return [best[key] for key in queries if key in order]

def main(argv: list[str] | None = None) -> int:
    """Command line of the module; see --help."""
    parser = argparse.ArgumentParser(prog="python -m repro.generate", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", required=True, help="file to append records to; parts are joined with `cat`")
    parser.add_argument("--plan", choices=prompts.PLANS, default="by-level")
    parser.add_argument("--no-chat-template", action="store_true", help="send the prompt as plain text")
    for name, default, note in (("queries", f"{AUTHORED}", "queries.jsonl, graded lists, .txt, or .gz"),
            ("model", "smollm2-135m", "built-in name, folder or hub id; or the server's name for it"),
            ("base-url", "", "an OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1"),
            ("workers", 8, "requests at a time"), ("limit", 10**9, "only so many, drawn with the seed"),
            ("batch-size", 64, "prompts"), ("device", "auto", ""), ("dtype", "auto", ""), ("seed", 0, ""),
            ("shard", "1/1", "only part I of N"), ("retries", 0, "more tries if a reply cannot be read"),
            *((name.replace("_", "-"), value, "sampling") for name, value in asdict(Sampling()).items())):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{note} (%(default)s)")
    a = parser.parse_args(argv)

    def work() -> None:
        part = re.fullmatch(r"(\d{1,6})/(\d{1,6})", a.shard) or (0, 0, 0)
        shard = (int(part[1]) - 1, int(part[2]))
        if min(a.retries + 1, a.limit, a.batch_size, a.workers) < 1 or not 0 <= shard[0] < shard[1]:
            raise ValueError("expected --retries >= 0, --limit, --batch-size, --workers >= 1, --shard I/N")
        sampling = Sampling(a.max_new_tokens, a.temperature, a.top_p, a.top_k)
        keys = list(queries := read_queries(a.queries))
        random.Random(a.seed).shuffle(keys)
        read_records(checked_output(a.out, lambda line: True))  # refused before a model is loaded
        generator = ServerGenerator(a.base_url, a.model, a.workers) if a.base_url else LocalGenerator(
            a.model, a.device, a.dtype, a.batch_size, a.no_chat_template)
        asked = {key: queries[key] for key in keys[: a.limit]}  # a larger limit contains a smaller one
        records = generate(asked, generator, plan=a.plan, seed=a.seed, retries=a.retries, sampling=sampling,
                           out=a.out, pool=list(queries.values()), progress=True, shard=shard)
        failed = [one_line(f"; failed: {r['id']}: {r['error']}") for r in records if r["error"]]
        print(f"{a.out}: {len(records) - len(failed)} of {len(records)} have passages" + "".join(failed[:1]))

    return ending(work)

if __name__ == "__main__":
    raise SystemExit(main())
