"""Write graded passages for queries: prompts in, one JSON record a query out.

A reply's random numbers depend on (seed, query id, attempt, levels) alone.  Records are appended
batch by batch; the same command goes on after a stop, with the same result.
"""

import argparse
import hashlib
import json
import os
import random
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import openai
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from repro import prompts
from repro.data import AUTHORED, read_jsonl, read_lines, report_unusable, text_field
from repro.support.files import check_output, one_line, run_command
from repro.support.models import load_pretrained, model_folder, pick_device, pick_dtype

Chat = list[dict[str, str]]
Jobs = list[tuple[Chat, str]]  # what is asked, and the name that seeds its reply
Record = dict[str, Any]
Planned = dict[str, Record]  # {id: record before it is asked}
Done = dict[tuple[str, int], Record]  # {(id, attempt): record}
URL = r"https?://([\w.-]+|\[[\da-f:.]+\])(:\d{1,5})?(/[\w.~/-]*)?"  # no password, no query


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: `top_k` 0 means from all, temperature below 1e-6 the likeliest one."""

    max_new_tokens: int = 100  # of a passage; a reply of `all-levels` may have four times as many
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 50

    def __post_init__(self) -> None:
        fits = self.max_new_tokens >= 1 and self.temperature >= 0 and self.top_k >= 0
        if not (fits and 0 < self.top_p <= 1):
            raise ValueError(
                f"expected max_new_tokens >= 1, temperature and top_k >= 0, 0 < top_p <= 1: {self}"
            )


class Refusal(prompts.ReplyError):
    """What a server answers instead of a reply."""


class Busy(Refusal):
    """A refusal that says nothing about what was asked."""


def seed_of(name: str) -> int:
    """A seed below 2^63 that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def draw_tokens(scores: torch.Tensor, noise: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits (B, V) -> 0 at the token that a row draws with its noise (B,) in [0, 1), else -inf."""
    size = scores.shape[-1]
    values, tokens = scores.topk(min(sampling.top_k or size, size))
    mass = (values / sampling.temperature).softmax(-1).double()  # (B, top_k), likeliest first
    kept = mass.cumsum(-1) - mass < sampling.top_p
    cumulative = torch.where(kept, mass, 0.0).cumsum(-1)
    drawn = (cumulative <= noise[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)  # inverse CDF
    drawn = drawn.minimum(kept.sum(-1, keepdim=True) - 1)  # rounding must not step past the kept
    return torch.full_like(scores, -torch.inf).scatter_(1, tokens.gather(-1, drawn), 0.0)


class LocalGenerator:
    """A local causal language model, by built-in name, folder or hub id.

    `plain` sends the prompt without a chat template.
    """

    def __init__(
        self,
        name: str = "smollm2-135m",
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 64,
        plain: bool = False,
    ) -> None:
        self.name = Path(name).name if Path(name).is_dir() else name  # no folders in the records
        self.batch_size = batch_size
        self.plain = plain
        self.device = pick_device(device)
        dtype = pick_dtype(dtype, self.device)
        folder = model_folder(name)
        self.tokenizer = load_pretrained(folder, AutoTokenizer, name)
        self.model = load_pretrained(folder, AutoModelForCausalLM, name, dtype=dtype)
        self.model.to(self.device).eval()
        config = self.model.config.get_text_config()
        self.context = getattr(config, "max_position_embeddings", None) or 10**9

        end = self.tokenizer.eos_token_id
        ends = self.model.generation_config.eos_token_id or []
        if isinstance(ends, int):
            ends = [ends]
        # All that stays of the model's own settings: a record names the others.
        settings = GenerationConfig(eos_token_id=[end, *ends], pad_token_id=end)
        self.model.generation_config = settings

    def prompt(self, chat: Chat) -> list[int]:
        """Token ids of a chat, ready for the model's turn."""
        text = "\n\n".join(turn["content"] for turn in chat)
        if self.plain:
            return self.tokenizer(text + "\n\n")["input_ids"]
        for turns in (chat, [{"role": "user", "content": text}]):  # some refuse a system's turn
            try:
                return self.tokenizer.apply_chat_template(
                    turns, add_generation_prompt=True, return_dict=False, enable_thinking=False
                )
            except Exception as error:  # there is none, or whatever the model's own code does
                reason = one_line(error)
        raise ValueError(f"{self.name}: its chat template fails; --no-chat-template? {reason}")

    @torch.inference_mode()
    def reply(self, jobs: Jobs, sampling: Sampling) -> list[str]:
        """One reply a job, as one batch that is padded on the left."""
        asked = [torch.tensor(self.prompt(chat)) for chat, _ in jobs]
        ids = pad_sequence(asked, batch_first=True, padding_value=-1, padding_side="left")
        ids = ids.to(self.device)
        noise = []
        for _, name in jobs:
            seeded = torch.Generator().manual_seed(seed_of(name))
            noise.append(torch.rand(sampling.max_new_tokens, generator=seeded, dtype=torch.float64))
        home = "cpu" if self.device.type == "mps" else self.device  # Apple's GPUs lack float64
        steps = iter(torch.stack(noise, dim=1).to(home))

        def draw(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return draw_tokens(scores.to(home), next(steps), sampling).to(scores.device)

        made = self.model.generate(
            ids.clamp(min=0),
            attention_mask=(ids >= 0).long(),
            max_new_tokens=sampling.max_new_tokens,
            logits_processor=[draw] if sampling.temperature >= 1e-6 else [],
        )
        replies = self.tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
        for row, prompt in enumerate(asked):
            if prompts.in_reasoning(self.tokenizer.decode(prompt[-8:])):
                replies[row] = "<think>" + replies[row]  # the template wrote the opening mark
        return replies


class ServerGenerator:
    """A model behind an OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1.

    The key is OPENAI_API_KEY's; no redirect and no proxy gets it.  The client tries again when the
    server is busy: after the time that it names, up to two minutes, or, in all, for a good minute.
    """

    def __init__(self, url: str, model: str, workers: int = 8, batch_size: int = 64) -> None:
        self.key = os.environ.get("OPENAI_API_KEY", "").strip() or "EMPTY"
        if not re.fullmatch(URL, url) or not re.fullmatch("[!-~]+", self.key):
            raise ValueError("expected --base-url http(s)://HOST:PORT/v1, a plain OPENAI_API_KEY")
        self.name = model
        self.workers = workers
        self.batch_size = batch_size
        self.context = 10**9  # the server knows
        self.prompt = str
        http_client = openai.DefaultHttpxClient(follow_redirects=False, trust_env=False)
        self.client = openai.OpenAI(
            base_url=url, api_key=self.key, max_retries=14, timeout=300, http_client=http_client
        )

    def reply(self, jobs: Jobs, sampling: Sampling) -> list[str | Refusal]:
        """One reply or refusal a job, `workers` at a time.  Raises what `one` raises."""
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda job: self.one(*job, sampling), jobs))

    def one(self, chat: Chat, name: str, sampling: Sampling) -> str | Refusal:
        """One reply or refusal.

        Raises ValueError for a status that every query would get: a redirect, 401, 402, 403, 404.
        """
        more = {"top_k": sampling.top_k} if sampling.top_k else {}  # not all servers know it
        try:
            done = self.client.chat.completions.create(
                model=self.name,
                messages=chat,
                max_tokens=sampling.max_new_tokens,
                seed=seed_of(name) % 2**31,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                extra_body=more,
            )
            choice = done.choices[0]
            text = choice.message.content
        except openai.APIStatusError as error:
            status = error.status_code
            reason = one_line(error.message.replace(self.key, "***"))
            if status < 400 or status in (401, 402, 403, 404):
                raise ValueError(f"the server refuses all: {reason}") from None
            return Busy(reason) if status in (429, 503) else Refusal(reason)
        except openai.OpenAIError as error:
            return Busy(f"no answer from the server: {error}")
        except (AttributeError, LookupError, TypeError, ValueError):
            return Refusal("the server's answer is no chat completion")
        if not isinstance(text, str) or choice.finish_reason == "content_filter":
            return Refusal(f"no content, finish reason {choice.finish_reason}")
        return text


def read_queries(path: str | Path) -> dict[str, str]:
    """{id: query} of a BEIR queries file, of graded lists, or of a .txt with one a line; also .gz.

    Without an id, line 7 is `q00007`.  A query that stood there before is left out, which stderr
    says.  Raises ValueError, with the line, for an empty query and an id of two queries.
    """
    is_text = ".txt" in Path(path).suffixes[-2:]
    read = read_lines if is_text else read_jsonl
    queries = {}
    seen = set()
    repeated = []
    for where, row in read(path):
        if is_text:
            row = {"query": row}
        field = "query" if "query" in row else "text"
        query = " ".join(text_field(row, field, where).split())
        line = where.rpartition(":")[2]
        key = f"q{int(line):05d}"
        for name in ("id", "_id"):
            if name in row:
                key = text_field(row, name, where)
        if query.lower() in seen:
            repeated.append(f"line {line}: {query}")
            continue
        if key in queries:
            raise ValueError(f"{where}: the id {key!r} stands for another query already")
        seen.add(query.lower())
        queries[key] = query
    count = len(queries) + len(repeated)
    report_unusable(path, repeated, count, "queries stood there before and are left out")
    return queries


def plan_records(
    queries: Mapping[str, str], generator: Any, settings: Record, pool: Sequence[str]
) -> Planned:
    """The records to be made, longest prompt first.

    A query that does not fit into the model is left out, which stderr says.
    """
    plan = settings["plan"]
    room = generator.context - settings["parameters"]["max_new_tokens"]
    planned = []
    large = []
    for key, query in queries.items():
        drawn = {}
        if plan == "by-level":
            drawn = prompts.draw(query, pool, settings["seed"])
        chats = [prompts.messages(plan, asked, query, drawn) for asked in prompts.calls(plan)]
        length = max(len(generator.prompt(chat)) for chat in chats)
        parameters = settings["parameters"] | {"drawn": drawn}
        record = {"id": key, "query": query, **settings, "parameters": parameters}
        if length > room:
            large.append(key)
        else:
            planned.append((-length, key, record))
    reason = f"do not fit into the model's {generator.context} tokens and are left out"
    report_unusable("queries", large, len(queries), reason)
    return {key: record for _, key, record in sorted(planned)}


def read_done(path: Path, queries: Mapping[str, str], settings: Record) -> Done:
    """What is in a file already; the torn last line of a command that was stopped is cut off.

    Raises ValueError for anything but records of this command, with these settings and queries.
    """
    done = {}
    if not path.exists():
        return done
    expected = settings | settings["parameters"]
    del expected["parameters"]
    raw = path.read_bytes()
    whole = raw.rfind(b"\n") + 1
    try:
        for line in raw[:whole].splitlines():
            record = json.loads(line)
            there = record | record["parameters"]
            expected["query"] = queries.get(record["id"], record["query"])
            for name, value in expected.items():
                if there[name] != value:
                    raise ValueError(f"it has {name} {there[name]!r}, this run has {value!r}")
            done[record["id"], record["attempt"]] = record
        if not b'{"id": '.startswith(raw[whole : whole + 7]):
            raise ValueError("its last line is none")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: expected records of this very command, but {error}") from error
    os.truncate(path, whole)
    return done


def pending(planned: Planned, done: Done, attempt: int, size: int) -> list[list[Record]]:
    """Batches to ask: at attempt 0 all records, then those whose reply before was not read.

    A batch of which one record is missing is there whole: what a prompt is padded with may change
    the last bits of its scores.
    """
    failed = {key for (key, number), r in done.items() if number == attempt - 1 and r["error"]}
    records = []
    for key, record in planned.items():
        if attempt == 0 or key in failed:
            unasked = {"attempt": attempt, "reply": [], "passages": {}, "error": None}
            records.append(record | unasked)
    batches = [records[start : start + size] for start in range(0, len(records), size)]
    return [batch for batch in batches if any((r["id"], attempt) not in done for r in batch)]


def ask_batch(generator: Any, batch: list[Record], sampling: Sampling) -> None:
    """Fill in reply, passages and error; a record with an error is asked for no further level.

    Raises ValueError if the server is busy for all, or refuses all of more than one at their first
    attempt: the rest would fare no better.
    """
    plan = batch[0]["plan"]
    for asked in prompts.calls(plan):
        going = [record for record in batch if record["error"] is None]
        if not going:
            return
        jobs = []
        for record in going:
            chat = prompts.messages(plan, asked, record["query"], record["parameters"]["drawn"])
            name = f"{record['seed']}|{record['id']}|{record['attempt']}|{asked}"
            jobs.append((chat, name))
        replies = generator.reply(jobs, sampling)

        refused = all(isinstance(reply, Refusal) for reply in replies)
        busy = all(isinstance(reply, Busy) for reply in replies)
        first = batch[0]["attempt"] == 0 and len(jobs) == len(batch) > 1
        if busy or (refused and first):
            raise ValueError(f"all {len(jobs)} queries of a batch failed: {replies[0]}")
        for record, reply in zip(going, replies, strict=True):
            try:
                if isinstance(reply, Refusal):
                    raise reply
                record["reply"] = reply if plan == "all-levels" else [*record["reply"], reply]
                found = prompts.read_reply(plan, asked, reply)
                record["passages"] |= {str(level): found[level] for level in asked}
            except prompts.ReplyError as error:
                record |= {"passages": None, "error": str(error)}


def append(batch: list[Record], done: Done, path: Path | None) -> None:
    """Add the records that are new to `done` and, in one piece, to the file."""
    lines = []
    for record in batch:
        key = record["id"], record["attempt"]
        if key not in done:
            done[key] = record
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.write("".join(lines).encode(errors="replace"))  # half a surrogate pair is no text


def generate(
    queries: Sequence[str] | Mapping[str, str],
    generator: Any,
    *,
    plan: str = "by-level",
    seed: int = 0,
    retries: int = 0,
    sampling: Sampling = Sampling(),
    out: Path | str | None = None,
    pool: Sequence[str] = (),
) -> list[Record]:
    """One record a query (text, or {id: text}), in their order; what is too long is left out.

    A reply that cannot be read gives `passages` None and the reason in `error`; it is asked again,
    up to `retries` times, with new seeds.  What is in the file `out` is not made again.  Unrelated
    queries are drawn from `pool` (default: `queries`).  Raises ValueError, before any work, for
    what does not fit, and later for what `ask_batch` does.
    """
    if not isinstance(queries, Mapping):
        queries = {f"q{number:05d}": query for number, query in enumerate(queries, start=1)}
    levels_a_call = len(prompts.calls(plan)[0])
    sampling = replace(sampling, max_new_tokens=sampling.max_new_tokens * levels_a_call)
    settings = {
        "prompt_version": prompts.PROMPT_VERSION,
        "plan": plan,
        "generator": generator.name,
        "parameters": {"levels": list(prompts.LEVELS), **asdict(sampling)},
        "seed": seed,
    }
    planned = plan_records(queries, generator, settings, list(pool or queries.values()))
    done = {}
    if out is not None:
        out = Path(out)
        done = read_done(out, queries, settings)
    for attempt in range(retries + 1):
        batches = pending(planned, done, attempt, generator.batch_size)
        for batch in tqdm(batches, f"attempt {attempt}", unit="batch", disable=None):
            ask_batch(generator, batch, sampling)
            append(batch, done, out)
    last = {key: record for (key, _), record in done.items()}
    return [last[key] for key in queries if key in planned]


def command_line() -> argparse.ArgumentParser:
    """What the command takes; long files of queries can be cut with `split`, results joined."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("python -m repro.generate", formatter_class=formatter)
    option = parser.add_argument
    option("--out", required=True, help="file to append records to; goes on with what is there")
    option("--queries", default=AUTHORED, help=".jsonl or .txt, also .gz; `split` cuts a long one")
    option("--model", default="smollm2-135m", help="built-in name, folder, hub id; server's name")
    option("--base-url", help="an OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1")
    option("--workers", type=int, default=8, help="requests at a time, of a server")
    option("--plan", choices=prompts.PLANS, default="by-level")
    option("--seed", type=int, default=0)
    option("--limit", type=int, default=10**9, help="only so many queries, drawn with the seed")
    option("--retries", type=int, default=0, help="more tries if a reply cannot be read")
    option("--batch-size", type=int, default=64, help="prompts at a time")
    option("--device", default="auto")
    option("--dtype", default="auto")
    option("--no-chat-template", action="store_true", help="send the prompt as plain text")
    option("--max-new-tokens", type=int, default=Sampling.max_new_tokens, help="of a passage")
    option("--temperature", type=float, default=Sampling.temperature)
    option("--top-p", type=float, default=Sampling.top_p)
    option("--top-k", type=int, default=Sampling.top_k)
    return parser


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    if min(args.retries + 1, args.limit, args.batch_size, args.workers) < 1:
        raise ValueError("expected --retries >= 0, and --limit, --batch-size, --workers >= 1")
    out = check_output(args.out, overwrite=True)  # what is there is gone on with
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.top_k)
    queries = read_queries(args.queries)
    keys = list(queries)
    random.Random(args.seed).shuffle(keys)
    asked = {key: queries[key] for key in keys[: args.limit]}  # a larger limit holds a smaller one
    if args.base_url:
        generator = ServerGenerator(args.base_url, args.model, args.workers, args.batch_size)
    else:
        generator = LocalGenerator(
            args.model, args.device, args.dtype, args.batch_size, args.no_chat_template
        )
    records = generate(
        asked,
        generator,
        plan=args.plan,
        seed=args.seed,
        retries=args.retries,
        sampling=sampling,
        out=out,
        pool=list(queries.values()),
    )
    failed = [record for record in records if record["error"]]
    print(f"{out}: {len(records) - len(failed)} of {len(records)} have passages")
    if failed:
        print(one_line(f"failed: {failed[0]['id']}: {failed[0]['error']}"))


def main(argv: list[str] | None = None) -> int:
    """Command line of the module; see --help."""
    args = command_line().parse_args(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
