"""Ask a generator for every level of a batch of queries, and turn its replies into cache records.

A `Run` holds the settings that all records of one file share.  Its `batch` makes the calls of the
plan one after the other, for all queries of the batch at once; a query whose reply cannot be read
is asked no further and gives a record with the reason.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from repro import prompts
from repro.cache import Record
from repro.generators import Sampling
from repro.likelihood import agreement, query_likelihood


class Run:
    """The fixed settings of one run, and what follows from them."""

    def __init__(
        self,
        generator: Any,
        plan: str,
        seed: int,
        levels: int,
        example: bool,
        sampling: Sampling,
        keep: float | None,
    ) -> None:
        self.generator, self.plan, self.seed, self.count = generator, plan, seed, levels
        self.example, self.sampling, self.keep = example, sampling, keep
        self.calls = prompts.calls(plan, levels)
        parameters: dict[str, Any] = {
            "levels": list(prompts.grades(levels)),
            "example": example,
            **vars(sampling),
        }
        if keep is not None:
            parameters["keep"] = keep
        self.identity = {
            "prompt_version": prompts.PROMPT_VERSION,
            "prompt_sha256": prompts.prompt_sha256(plan, levels, example),
            "plan": plan,
            "generator": generator.name,
            "parameters": parameters,
            "seed": seed,
        }

    def chat(
        self, asked: tuple[int, ...], query: str, drawn: Mapping[str, str], done: Mapping[int, str]
    ) -> list:
        """The messages of one call for one query."""
        return prompts.messages(self.plan, asked, query, drawn, done, self.count, self.example)

    def batch(
        self,
        keys: Sequence[str],
        queries: Mapping[str, str],
        drawn: Mapping[str, dict],
        attempt: int,
        bar: Any,
    ) -> list[Record]:
        """Ask for every level of these queries; one record each.  A query that failed is asked no further."""
        done: dict[str, dict[int, str]] = {key: {} for key in keys}
        replies: dict[str, list[str]] = {key: [] for key in keys}
        errors: dict[str, str] = {}
        for asked in self.calls:
            going = [key for key in keys if key not in errors]
            chats = [self.chat(asked, queries[key], drawn[key], done[key]) for key in going]
            names = [f"{self.seed}|{key}|{attempt}|{asked}" for key in going]
            texts = self.generator.reply(chats, names, self.sampling, bar.tokens) if going else []
            for key, text in zip(going, texts, strict=True):
                replies[key].append(text)
                try:
                    done[key].update(prompts.read_reply(self.plan, asked, text))
                except prompts.ReplyError as error:
                    errors[key] = str(error)
            bar.update(len(keys))
        scores: dict[str, dict[int, float]] = {}
        if self.keep is not None:
            going = [key for key in keys if key not in errors]
            pairs = [(queries[key], done[key][level]) for key in going for level in done[key]]
            values = iter(query_likelihood(self.generator, pairs))
            scores = {key: {level: round(next(values), 4) for level in done[key]} for key in going}
            for key in going:
                if (share := agreement(scores[key])) < self.keep:
                    errors[key] = f"the query likelihood has {share:.0%} of the levels' pairs in order"
        records = []
        for key in keys:
            record: Record = {"id": key, "query": queries[key], **self.identity, "attempt": attempt}
            record["parameters"] = {**self.identity["parameters"], "drawn": drawn[key]}
            record["reply"] = replies[key][0] if self.plan == "all-levels" else replies[key]
            good = {str(level): passage for level, passage in done[key].items()}
            record["passages"] = None if key in errors else good
            record["error"] = errors.get(key)
            if key in scores:
                record["likelihood"] = {str(level): value for level, value in scores[key].items()}
            records.append(record)
        return records


class Bar:
    """Progress on stderr: replies done, time left, tokens a second."""

    def __init__(self, total: int, shown: bool) -> None:
        self.bar = tqdm(
            total=total, unit="reply", disable=not shown, smoothing=0.1, mininterval=1.0, miniters=0
        )
        self.made = 0

    def tokens(self, count: int) -> None:
        """Count new tokens."""
        self.made += count
        seconds = self.bar.format_dict["elapsed"] or 1e-9
        self.bar.set_postfix_str(f"{self.made} tokens, {self.made / seconds:.0f} tokens/s", refresh=False)
        self.bar.update(0)

    def update(self, count: int) -> None:
        """Count finished replies."""
        self.bar.update(count)
