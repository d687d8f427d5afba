"""How likely a local language model finds the query, given the passage: a relevance score without labels.

The model reads the passage and then the query; the score is the mean log probability of the
query's tokens.  A passage that answers the query makes its words easier to foresee (the query
likelihood of language-model retrieval).  `repro.generate --keep` uses it to refuse lists whose
order contradicts their grades, and `repro.quality` to report on lists.  This is beyond the paper.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from tqdm import tqdm

from repro.decode import left_pad

FRAME = "{passage}\n\nThe question that this text answers:"
LONGEST_PASSAGE, LONGEST_QUERY = 256, 64  # tokens; what is longer is cut


@torch.inference_mode()
def query_likelihood(
    generator: Any, pairs: Sequence[tuple[str, str]], batch_size: int = 16, progress: bool = False
) -> list[float]:
    """Mean natural-log probability of the query's tokens after the passage, one number a (query, passage).

    generator: a `LocalGenerator` (its model and tokenizer are used, without the chat template).
    Batches are sorted by length; the output layer runs on the query's positions only.
    """
    model, tokenizer = generator.model, generator.tokenizer
    head, tail = FRAME.split("{passage}")
    frame = tokenizer(tail, add_special_tokens=False)["input_ids"]
    rows: list[list[int]] = []
    counts: list[int] = []
    for query, passage in pairs:
        query_ids = tokenizer(" " + query, add_special_tokens=False)["input_ids"][:LONGEST_QUERY]
        passage_ids = tokenizer(head + passage, add_special_tokens=False)["input_ids"][:LONGEST_PASSAGE]
        rows.append(passage_ids + frame + query_ids)
        counts.append(len(query_ids))
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    scores = [0.0] * len(rows)
    pad = min(generator.stop) if generator.stop else 0
    for start in tqdm(
        range(0, len(order), batch_size), desc="likelihood", unit="batch", disable=not progress
    ):
        chosen = order[start : start + batch_size]
        ids, mask = left_pad([rows[i] for i in chosen], pad, model.device)
        longest = max(counts[i] for i in chosen)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions, logits_to_keep=longest + 1).logits[
            :, :-1
        ]
        log_p = logits.float().log_softmax(-1).gather(-1, ids[:, -longest:, None])[..., 0]
        for row, i in enumerate(chosen):
            scores[i] = log_p[row, longest - counts[i] :].mean().item() if counts[i] else float("nan")
    return scores


def agreement(scores: Mapping[int, float]) -> float:
    """Share of the pairs of levels that a score puts in the order of their grades; ties count as wrong."""
    pairs = [(high, low) for low, high in combinations(sorted(scores), 2)]
    return sum(scores[high] > scores[low] for high, low in pairs) / len(pairs) if pairs else 1.0
