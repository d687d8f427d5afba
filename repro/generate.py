"""Write graded passages for queries: prompts in, cache records out.

`generate` is the whole process: draw what the lower levels are about, ask the model, read its
replies, and repeat the failed queries with new seeds.  With `out` every batch is appended to a
cache file, and a run that was stopped goes on where it was.

The records do not depend on where a run was stopped.  The random numbers of a reply depend on
(seed, query id, attempt, levels) alone.  Which queries share a batch, which could still tip a
rounding, follows from the query file, the batch size and the number of shards, never from what is
done already: a half-written batch is generated again whole, and only its missing records written.
"""

import argparse
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from repro import cache, prompts
from repro.ask import Bar, Run
from repro.cache import CacheError, CacheWriter, Record
from repro.checkpoints import CheckpointError
from repro.files import DataError, read_jsonl, read_lines, text_field
from repro.generators import GenerateError, LocalGenerator, Sampling, ServerGenerator, load_generator

__all__ = ["GenerateError", "Sampling", "ServerGenerator", "generate", "load_generator", "read_queries"]


def read_queries(path: str | Path) -> dict[str, str]:
    """{id: query} from a BEIR queries file (`_id`, `text`), graded lists (`query`, optional `id`), or a .txt.

    The .txt has one query a line; plain or .gz.  Without ids, line 7 is `q00007`.  Raises DataError
    for an empty query, or an id or query that stands there twice, naming file and line.
    """
    path = Path(path)
    is_text = ".txt" in path.suffixes[-2:]
    rows = ((n, {"query": line}) for n, line in read_lines(path)) if is_text else read_jsonl(path)
    queries: dict[str, str] = {}
    seen: dict[str, int] = {}
    for number, row in rows:
        where = f"{path}:{number}"
        field = "text" if "query" not in row and "text" in row else "query"
        query = " ".join(text_field(row, field, where).split())
        name = next((name for name in ("_id", "id") if name in row), None)
        key = text_field(row, name, where) if name else f"q{number:05d}"
        if key in queries:
            raise DataError(f"{where}: field {name!r}: {key!r} stands for an earlier query already")
        if (first := seen.setdefault(query.lower(), number)) != number:
            raise DataError(f"{where}: field {field!r}: the same query stands in line {first}")
        queries[key] = query
    if not queries:
        raise DataError(f"{path}: expected queries, found none")
    return queries


def choose(queries: Mapping[str, str], limit: int | None, seed: int) -> dict[str, str]:
    """`limit` queries drawn with the seed, in file order; a larger limit contains a smaller one."""
    keys = list(queries)
    random.Random(seed).shuffle(keys)
    kept = set(keys[:limit])
    return {key: query for key, query in queries.items() if key in kept}


def batches(keys: Sequence[str], rows: int) -> Iterator[Sequence[str]]:
    """Cut a list of query ids into runs of `rows`."""
    return (keys[i : i + rows] for i in range(0, len(keys), rows))


def generate(
    queries: Sequence[str] | Mapping[str, str],
    generator: Any,
    *,
    plan: str = "by-level",
    seed: int = 0,
    levels: int = 4,
    retries: int = 0,
    example: bool = False,
    sampling: Sampling | None = None,
    out: str | Path | None = None,
    pool: Sequence[str] | None = None,
    keep: float | None = None,
    rank: int = 0,
    world: int = 1,
    progress: bool = False,
) -> list[Record]:
    """One record a query, in the order of `queries` (of this rank's share if world > 1).

    queries: texts, or {id: text}; pool: where unrelated queries are drawn from (default: `queries`).
    A reply that cannot be read gives a record with `passages` None and the reason in `error`, and is
    asked again up to `retries` times with new seeds.  keep: drop lists in which less than this share
    of the pairs of levels is in order by query likelihood (beyond the paper; local models only).
    With `out` the records go into that cache file (of this rank) and those already there are not
    made again.  Raises GenerateError, CacheError, or ValueError for an unknown plan or level count.
    """
    if not isinstance(queries, Mapping):
        queries = {f"q{number:05d}": query for number, query in enumerate(queries, start=1)}
    texts = [query.strip() for query in queries.values()]
    if not all(texts):
        raise GenerateError(f"query {list(queries)[texts.index('')]!r}: expected text, found it empty")
    if keep is not None and not isinstance(generator, LocalGenerator):
        raise GenerateError("keep: query likelihood needs a local model")
    run = Run(generator, plan, seed, levels, example, sampling or Sampling(), keep)
    pool = list(pool or texts)
    drawn = {
        key: prompts.draw(query, pool, seed) if plan != "all-levels" else {} for key, query in queries.items()
    }
    lengths = {
        key: max(
            generator.check(f"query {key!r}", run.chat(asked, query, drawn[key], {}), run.sampling)
            for asked in run.calls
        )
        for key, query in queries.items()
    }
    order = sorted(queries, key=lambda key: (-lengths[key], key))[rank::world]
    rows = generator.rows(max(lengths.values(), default=1), run.sampling)
    with ExitStack() as stack:
        records: list[Record] = []
        writer = None
        if out is not None:
            writer = stack.enter_context(CacheWriter(cache.shard_path(out, rank, world)))
            others = {Path(out), *cache.shards_of(out)} - {writer.path}
            records = [r for path in sorted(others) if path.exists() for r in cache.read_records(path)]
            records = writer.records + records
            cache.check_identity(out, records, run.identity)
            for record in records:
                if queries.get(record["id"], record["query"]) != record["query"]:
                    raise CacheError(
                        f"{out}: id {record['id']!r} stands for the query {record['query']!r} there"
                    )
        seen = {(record["id"], record["attempt"]): record["passages"] is not None for record in records}
        good = {key for (key, _), fine in seen.items() if fine}
        left = sum(key not in good and (key, retries) not in seen for key in order)
        bar = Bar(left * len(run.calls), progress)
        stack.callback(bar.bar.close)
        for attempt in range(retries + 1):
            todo = [key for key in order if attempt == 0 or seen.get((key, attempt - 1)) is False]
            for keys in batches(todo, rows):
                missing = {key for key in keys if (key, attempt) not in seen and key not in good}
                if not missing:
                    continue
                made = [r for r in run.batch(keys, queries, drawn, attempt, bar) if r["id"] in missing]
                if writer:
                    writer.append(made)
                records += made
                for record in made:
                    seen[record["id"], attempt] = record["passages"] is not None
                    if record["passages"] is not None:
                        good.add(record["id"])
    best, own = cache.latest(records), set(order)
    return [best[key] for key in queries if key in best and key in own]


def build_parser() -> argparse.ArgumentParser:
    """The command line of `python -m repro.generate`."""
    parser = argparse.ArgumentParser(
        prog="python -m repro.generate",
        description="Write graded passages for queries into a cache file.  A run that was stopped goes on "
        "with the same command.  Under torchrun each process writes its own shard; join them with --merge.",
    )
    add = parser.add_argument
    add(
        "--queries",
        default=str(Path(__file__).parent.parent / "cached_prompts" / "authored.jsonl"),
        help="queries.jsonl (_id, text), graded lists (query, id) or .txt, plain or .gz (default: the kit's "
        "own)",
    )
    add("--out", required=True, help="cache file to append to")
    add("--model", default="smollm2-135m", help="built-in name, folder or hub id (default %(default)s)")
    add("--plan", choices=prompts.PLANS, default="by-level", help="default %(default)s")
    add("--levels", type=int, default=4, help="number of levels, 2 to 5 (default 4)")
    add("--example", action="store_true", help="put one finished example in front")
    add("--seed", type=int, default=0)
    add("--limit", type=int, help="only so many queries, drawn with the seed")
    add(
        "--retries",
        type=int,
        default=0,
        help="ask again this often, with new seeds, when a reply cannot be read",
    )
    add(
        "--keep",
        type=float,
        metavar="SHARE",
        help="refuse a list in which the query likelihood has less than this share of the pairs of levels "
        "in order (0 only records the likelihoods); refused lists count as failed",
    )
    for name, kind in (("max_new_tokens", int), ("temperature", float), ("top_p", float), ("top_k", int)):
        add(
            "--" + name.replace("_", "-"),
            type=kind,
            default=None,
            help=f"default {getattr(Sampling, name)}" + " (400 for all-levels)" * (name == "max_new_tokens"),
        )
    add("--batch-size", default="auto", help="queries a batch, or auto")
    add("--memory-gb", type=float, help="memory limit for --batch-size auto (default: 60 %% of what is free)")
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--no-chat-template", action="store_true", help="send the prompt as plain text")
    add("--base-url", help="use an OpenAI-compatible server instead, e.g. http://127.0.0.1:8000/v1")
    add("--api-model", help="the model's name on that server (default: --model)")
    add("--workers", type=int, default=8, help="requests under way at a time (default %(default)s)")
    add("--merge", action="store_true", help="only join the shards of --out into it")
    return parser


def run_command(arguments: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code.  Raises the kit's errors."""
    if arguments.merge:
        print(f"{arguments.out}: {cache.merge(arguments.out)} records")
        return 0
    if arguments.batch_size != "auto" and not (arguments.batch_size.isdigit() and int(arguments.batch_size)):
        raise GenerateError(f"--batch-size {arguments.batch_size!r}: expected auto or a number of 1 or more")
    if arguments.retries < 0 or (arguments.limit is not None and arguments.limit < 1):
        raise GenerateError(
            "--retries: expected 0 or more" if arguments.retries < 0 else "--limit: expected 1 or more"
        )
    chosen = {
        name: getattr(arguments, name) for name in vars(Sampling()) if getattr(arguments, name) is not None
    }
    if arguments.plan == "all-levels":
        chosen.setdefault("max_new_tokens", 400)
    if arguments.base_url:
        chosen["top_k"] = 0  # not part of the protocol
    sampling = Sampling(**chosen)
    prompts.grades(arguments.levels)
    all_queries = read_queries(arguments.queries)
    queries = choose(all_queries, arguments.limit, arguments.seed)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if arguments.base_url:
        generator: Any = ServerGenerator(
            arguments.base_url, arguments.api_model or arguments.model, arguments.workers
        )
    else:
        if world > 1 and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
        size = None if arguments.batch_size == "auto" else int(arguments.batch_size)
        generator = load_generator(
            arguments.model,
            arguments.device,
            arguments.dtype,
            size,
            arguments.memory_gb,
            arguments.no_chat_template,
        )
    records = generate(
        queries,
        generator,
        plan=arguments.plan,
        seed=arguments.seed,
        levels=arguments.levels,
        keep=arguments.keep,
        retries=arguments.retries,
        example=arguments.example,
        sampling=sampling,
        out=arguments.out,
        pool=list(all_queries.values()),
        rank=rank,
        world=world,
        progress=True,
    )
    failed = [record for record in records if record["passages"] is None]
    where = cache.shard_path(arguments.out, rank, world)
    print(f"{where}: {len(records) - len(failed)} of {len(records)} queries have passages")
    if failed:
        print(f"{len(failed)} failed, for example {failed[0]['id']}: {failed[0]['error']}", file=sys.stderr)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Command line of the module; see --help."""
    arguments = build_parser().parse_args(argv)
    try:
        return run_command(arguments)
    except (GenerateError, CacheError, CheckpointError, DataError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
