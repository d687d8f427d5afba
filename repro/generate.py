"""Write graded passages for queries: prompts in, one JSON record a query out.

A reply's random numbers depend on (seed, query id, attempt, levels) alone.  Records are appended
batch by batch; the same command goes on after a stop, with the same result.
"""

import hashlib
import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import openai
import torch
from tqdm import trange
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from repro import prompts
from repro.data import AUTHORED, Place, read_jsonl, read_lines, report_unusable, text_field
from repro.support.files import check_output, command_line, naming, one_line, write_text
from repro.support.models import load_pretrained, model_folder, pick_device, pick_dtype, plain_name


@dataclass(frozen=True)
class Job:
    """Write graded passages for queries; goes on with the records that are in --out.

    out: file to append records to, plain text
    plan: by-level (one level a call, for small models) or all-levels (one call)
    seed, limit: only so many queries, drawn with the seed
    retries: more tries if a reply cannot be read
    batch_size: prompts at a time; a server is asked 8 at a time

    queries: .jsonl or .txt, also .gz; `split` cuts a long one, and results can be joined
    model: built-in name, folder, hub id; of a server its name there
    base_url: an OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1; key in OPENAI_API_KEY;
        a model that reasons needs the server's reasoning parser
    device, dtype: where and in which numbers a local model computes

    max_new_tokens: of a passage
    temperature, top_p, top_k: how tokens are drawn; top_k 0 means from all
    """

    out: str
    plan: str = "by-level"
    seed: int = 0
    limit: int = 10**9
    retries: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        prompts.calls(self.plan)  # raises ValueError for another
        if min(self.limit, self.retries + 1, self.batch_size) < 1:
            raise ValueError("expected --retries >= 0, and --limit and --batch-size >= 1")


@dataclass(frozen=True)
class Source:
    """Who writes, for which queries."""

    queries: Path = AUTHORED
    model: str = "smollm2-135m"
    base_url: str = ""
    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: `top_k` 0 means from all, temperature 0 the likeliest one."""

    max_new_tokens: int = 100  # of a passage; a reply of `all-levels` may have four times as many
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 50

    def __post_init__(self) -> None:
        if not (
            self.max_new_tokens >= 1
            and self.temperature >= 0
            and self.top_k >= 0
            and 0 < self.top_p <= 1
        ):
            raise ValueError(
                "expected max_new_tokens >= 1, temperature and top_k >= 0, 0 < top_p <= 1, "
                f"found {self}"
            )


def seed_of(name: str) -> int:
    """A seed below 2^63 that depends on the text alone."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) >> 1


def draw_tokens(scores: torch.Tensor, noise: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits (B, V) -> the same, but inf at the token that a row draws with its noise (B,) < 1.

    What is added up is float64 and on the CPU, as the noise is: Apple's GPUs lack float64.
    """
    size = scores.shape[-1]
    values, tokens = scores.topk(min(sampling.top_k or size, size))
    mass = (values / max(sampling.temperature, 1e-9)).softmax(-1)  # (B, top_k), likeliest first
    mass = mass.cpu().double()
    kept = mass.cumsum(-1) - mass < sampling.top_p
    cumulative = (mass * kept).cumsum(-1)
    drawn = torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:], right=True)
    tokens = tokens.gather(-1, drawn.to(tokens.device))
    return scores.scatter(-1, tokens, torch.inf)


class LocalGenerator:
    """A local causal language model, by built-in name, folder or hub id."""

    def __init__(self, name: str, device: str = "auto", dtype: str = "auto") -> None:
        folder = model_folder(name)
        self.name = plain_name(name)
        place = pick_device(device)
        number = pick_dtype(dtype, place)
        self.tokenizer = load_pretrained(folder, AutoTokenizer, name)
        self.model = load_pretrained(folder, AutoModelForCausalLM, name, dtype=number).to(place)
        config = self.model.config.get_text_config()
        self.context = getattr(config, "max_position_embeddings", 10**9)

        end = self.tokenizer.eos_token_id
        ends = self.model.generation_config.eos_token_id or end
        ends = ends if isinstance(ends, list) else [ends]
        self.tokenizer.pad_token_id = end
        # All that stays of the model's own settings: a record names the others.
        self.model.generation_config = GenerationConfig(eos_token_id=[end, *ends], pad_token_id=end)

    def prompt(self, chat: list) -> list:
        """Token ids of a chat, ready for the model's turn; ValueError if its template fails."""
        text = "\n\n".join(turn["content"] for turn in chat)
        for turns in (chat, [{"role": "user", "content": text}]):  # some refuse a system's turn
            try:
                return self.tokenizer.apply_chat_template(
                    turns, add_generation_prompt=True, return_dict=False, enable_thinking=False
                )
            except Exception as error:  # there is none, or whatever the model's own code does
                reason = one_line(error)
        raise ValueError(f"{self.name}: its chat template fails: {reason}")

    def reply(self, jobs: list, sampling: Sampling) -> list:
        """One reply a job (chat, name that seeds it), as one batch that is padded on the left."""
        asked = [self.prompt(chat) for chat, _ in jobs]
        padded = self.tokenizer.pad({"input_ids": asked}, padding_side="left", return_tensors="pt")
        rows = [torch.Generator().manual_seed(seed_of(name)) for _, name in jobs]
        most = sampling.max_new_tokens
        noise = [torch.rand(most, generator=row, dtype=torch.float64) for row in rows]
        steps = iter(torch.stack(noise, 1))
        made = self.model.generate(
            **padded.to(self.model.device),
            max_new_tokens=most,
            logits_processor=[lambda _, scores: draw_tokens(scores, next(steps), sampling)],
        )
        replies = made[:, padded.input_ids.shape[1] :]
        replies = self.tokenizer.batch_decode(replies, skip_special_tokens=True)
        try:
            prompts.answer(self.tokenizer.decode(asked[0][-8:]))
        except prompts.ReplyError:  # the template has begun the reasoning
            replies = ["<think>" + reply for reply in replies]
        return replies


class ServerGenerator:
    """A model behind an OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1.

    The key is OPENAI_API_KEY's; no redirect and no proxy gets it.  The client tries again when the
    server is busy: after the time that it names, up to two minutes, or, in all, for a good minute.
    A request that gets no answer is given up after five minutes, and sent 15 times.
    """

    context = 10**9  # the server knows
    prompt = str

    def __init__(self, url: str, model: str) -> None:
        self.name = model
        self.key = os.environ.get("OPENAI_API_KEY", "").strip() or "EMPTY"
        http_client = openai.DefaultHttpxClient(follow_redirects=False, trust_env=False)
        if not url.startswith("http"):
            raise ValueError(f"--base-url: expected http(s)://HOST:PORT/v1, found {url}")
        with naming("--base-url"):
            self.client = openai.OpenAI(
                base_url=url, api_key=self.key, max_retries=14, timeout=300, http_client=http_client
            )

    def reply(self, jobs: list, sampling: Sampling) -> list:
        """What `one` returns for each job (chat, name that seeds it), 8 at a time."""
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(lambda job: self.one(*job, sampling), jobs))

    def one(self, chat: list, name: str, sampling: Sampling) -> str | Exception:
        """A reply; else a ReplyError, or a ConnectionError that says nothing about the query.

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
        except openai.OpenAIError as error:
            reason = one_line(str(error).replace(self.key, "***"))
            status = getattr(error, "status_code", 503)  # without: no answer
            if status < 405 and status != 400:
                raise ValueError(reason) from None
            kind = ConnectionError if status in (429, 503) else prompts.ReplyError
            return kind(reason)
        except Exception:  # whatever a foreign server's JSON makes of it
            return prompts.ReplyError("the server's answer is no chat completion")
        if choice.finish_reason == "content_filter" or not isinstance(text, str):
            return prompts.ReplyError(f"no content, finish reason {choice.finish_reason}")
        return text


Writer = LocalGenerator | ServerGenerator


def read_queries(path: Place) -> dict:
    """{id: query} of a BEIR queries file, of graded lists, or of a .txt with one a line; also .gz.

    Without an id, line 7 is `q00007`.  A query or an id that stood there before is left out, which
    stderr says.  Raises ValueError, with the line, for an empty query.
    """
    is_text = ".txt" in Path(path).suffixes
    read = read_lines if is_text else read_jsonl
    queries = {}
    seen = set()
    repeated = []
    for where, row in read(path):
        if is_text:
            row = {"text": row}
        number = where.rpartition(":")[2]
        row.setdefault("id", row.get("_id", f"q{number:0>5}"))
        key = text_field(row, "id", where)
        field = "query" if "query" in row else "text"
        query = text_field(row, field, where)
        query = " ".join(query.split())
        if key in queries or query.lower() in seen:
            repeated.append(where)
        else:
            queries[key] = query
            seen.add(query.lower())
    report_unusable(
        path,
        repeated,
        len(queries) + len(repeated),
        "queries or ids stood there before and are left out",
    )
    return queries


def plan_records(queries: dict, generator: Writer, job: Job, sampling: Sampling) -> dict:
    """{id: record to be made}, in an order drawn with the seed.

    A query that does not fit into the model is left out, which stderr says.
    """
    pool = list(queries.values())
    items = list(queries.items())
    random.Random(job.seed).shuffle(items)
    planned = {}
    large = []
    for key, query in items[: job.limit]:
        drawn = prompts.draw(query, pool, job.seed) if job.plan == "by-level" else {}
        calls = prompts.calls(job.plan)
        chats = [prompts.messages(job.plan, asked, query, drawn) for asked in calls]
        length = max(len(generator.prompt(chat)) for chat in chats)
        if length + sampling.max_new_tokens > generator.context:
            large.append(key)
            continue
        planned[key] = {
            "id": key,
            "query": query,
            "prompt_version": prompts.PROMPT_VERSION,
            "plan": job.plan,
            "generator": generator.name,
            "parameters": {"levels": [*prompts.LEVELS], **vars(sampling), "drawn": drawn},
            "seed": job.seed,
        }
    report_unusable(
        "queries",
        large,
        len(large) + len(planned),
        f"do not fit into the model's {generator.context} tokens and are left out",
    )
    return planned


def read_records(path: Place, planned: dict) -> dict:
    """{id: last record in a file}; a last line that a stopped command left torn is cut or ended.

    Raises ValueError, before the file is touched, for anything but planned records.  What was
    drawn is taken from the file: it depends on all queries, and some may have been added.
    """
    *lines, torn = Path(path).read_bytes().split(b"\n")
    with suppress(ValueError):
        json.loads(torn)
        lines.append(torn)  # whole but for its end
    records = {}
    with naming(f"{path}: expected records of this very command"):
        for line in lines:
            record = json.loads(line)
            key = record["id"]
            if key not in planned:
                raise ValueError(f"it has id {key!r}, which is not planned")
            plan = planned[key]
            plan["parameters"]["drawn"] = record["parameters"]["drawn"]
            found = record["parameters"] | record
            expected = plan["parameters"] | plan
            for field, value in expected.items():
                if found[field] != value:
                    raise ValueError(f"it has {field} {found[field]!r}, this run has {value!r}")
            records[key] = record
        if not b'{"id": '.startswith(torn[:7]):
            raise ValueError("its last line is none")
    if torn:
        write_text(path, b"\n".join([*lines, b""]).decode())
    return records


def ask_batch(generator: Writer, batch: list, attempt: int, sampling: Sampling) -> None:
    """Fill in attempt, reply, passages and error; after an error no further level is asked for.

    Raises ValueError if the server does not answer any of them.
    """
    for record in batch:
        record.update(attempt=attempt, reply=[], passages={}, error=None)
    plan = batch[0]["plan"]
    for asked in prompts.calls(plan):
        going = [record for record in batch if not record["error"]]
        if not going:
            return
        jobs = []
        for record in going:
            chat = prompts.messages(plan, asked, record["query"], record["parameters"]["drawn"])
            name = f"{record['seed']}|{record['id']}|{attempt}|{asked}"
            jobs.append((chat, name))
        replies = generator.reply(jobs, sampling)
        if {type(reply) for reply in replies} == {ConnectionError}:
            raise ValueError(f"all queries of a batch failed: {replies[0]}")
        for record, reply in zip(going, replies, strict=True):
            try:
                if not isinstance(reply, str):
                    raise reply
                record["reply"] = reply if plan == "all-levels" else [*record["reply"], reply]
                for level, passage in prompts.read_reply(plan, asked, reply).items():
                    record["passages"][str(level)] = passage
            except (prompts.ReplyError, ConnectionError) as error:
                record.update(passages=None, error=str(error))


def generate(
    queries: dict,
    generator: Writer,
    out: Place = "",
    sampling: Sampling = Sampling(),
    **settings: object,
) -> list:
    """One record a query of {id: text}, in their order; what is too long is left out.

    The settings are those of `Job`: plan, seed, limit, retries, batch_size.  Of more than `limit`
    queries so many are drawn with the seed; a larger limit holds a smaller one.  A reply that
    cannot be read gives `passages` None and the reason in `error`; it is asked again, up to
    `retries` times, with new seeds.  What is in the file `out` is not made again.
    Raises ValueError, before any work, for what does not fit, and later if a server fails, or
    refuses a whole batch and has not answered any query yet.
    """
    job = Job(out, **settings)
    most = sampling.max_new_tokens * len(prompts.calls(job.plan)[0])
    sampling = replace(sampling, max_new_tokens=most)
    records = plan_records(queries, generator, job, sampling)
    if os.path.exists(out):
        records |= read_records(out, records)
    for attempt in range(job.retries + 1):
        pending = [
            record
            for record in records.values()
            if record.get("attempt", -1) < attempt and record.get("error", "not asked")
        ]
        for start in trange(0, len(pending), job.batch_size, disable=None):
            batch = pending[start : start + job.batch_size]
            ask_batch(generator, batch, attempt, sampling)
            answered = any(record.get("reply") for record in records.values())
            if len(batch) > 1 and not attempt and not answered:  # the rest would fare no better
                raise ValueError(f"all queries of a batch failed: {batch[0]['error']}")
            if out:
                Path(out).parent.mkdir(parents=True, exist_ok=True)
                lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in batch]
                with open(out, "ab") as file:  # half a surrogate pair is no text
                    file.write("".join(lines).encode(errors="replace"))
    return [records[key] for key in queries if key in records]


def run(job: Job, source: Source, sampling: Sampling) -> None:
    """Do what the command line asks for."""
    out = check_output(job.out, overwrite=True)  # what is there is gone on with
    queries = read_queries(source.queries)
    if source.base_url:
        generator = ServerGenerator(source.base_url, source.model)
    else:
        generator = LocalGenerator(source.model, source.device, source.dtype)
    records = generate(queries, generator, sampling=sampling, **vars(job) | {"out": out})
    failed = [record for record in records if record["error"]]
    print(f"{out}: {len(records) - len(failed)} of {len(records)} have passages")
    for record in failed[:3]:
        print(one_line(f"failed: {record['id']}: {record['error']}"))


main = command_line(run, Job, Source, Sampling)

if __name__ == "__main__":
    raise SystemExit(main())
