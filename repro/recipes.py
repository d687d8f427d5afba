"""The released ways to shape lists: graded, synthetic binary, real binary, synthetic + real."""

import os
import random
from collections.abc import Iterator
from dataclasses import replace

from repro.data import (
    GradedList,
    Lists,
    Place,
    find_file,
    load_beir,
    plain_query,
    read_jsonl,
    report_unusable,
    text_field,
)


def recipe(lists: Lists, name: str, seed: int) -> Lists:
    """The lists as a released command shapes them; draws depend on seed and list id alone.

    "graded": every passage with its own grade.  "binary": a positive drawn from grades 3 and 2, at
    grade 3, and the passages of grades 1 and 0 at grade 0 (the released synthetic binary, k = 3).
    Raises ValueError for another name, and for "binary" if a list is not one passage a grade, best
    first.
    """
    if name == "graded":
        return lists
    shaped = []
    for item in lists:
        if name != "binary" or item.grades != [3, 2, 1, 0]:
            raise ValueError(
                f"{name}: expected binary, grades 3, 2, 1, 0; {item.id!r} has {item.grades}"
            )
        positive = random.Random(f"{seed} {item.id}").choice(item.passages[:2])
        shaped.append(replace(item, passages=[positive, *item.passages[2:]], grades=[3, 0, 0]))
    return shaped


def _mined(path: Place) -> Iterator:
    """(query id, passage ids) of lines {"qid": "1", "docid": ["7", ...]}, as `trove` has them."""
    for where, row in read_jsonl(path):
        ids = row.get("docid")
        if not isinstance(ids, list):
            raise ValueError(f"{where}: field 'docid': expected a list of ids, found {ids!r:.60}")
        yield text_field(row, "qid", where), dict.fromkeys(map(str, ids))


def real_lists(path_or_hub_id: Place, negatives: Place | None = None, seed: int = 0) -> Lists:
    """The released real binary (k = 3): an annotated positive (score >= 1) and two others, drawn.

    Grades 3, 1, 1, as in the released synthetic + real; train judgments.  The others are the
    query's passages judged 0, or stand in a `negatives` file, here or on the hub
    (`BatsResearch/sycl/real_data/bm25_top_docs/train_qrels.jsonl`: BM25's top 1000), of which the
    last line of a query counts.  With one other passage k = 2.  Passages that are not in the corpus
    are left out, and so are queries without a positive or another passage, counted on stderr.
    Raises ValueError for a bad row, and if no query is left.
    """
    mined = _mined(find_file(*os.path.split(negatives))) if negatives else None
    corpus, queries, qrels = load_beir(path_or_hub_id, "train")
    lists = {}
    for query, ids in mined or qrels.items():
        judged = qrels.get(query, {})
        good = [corpus[p] for p in judged if judged[p] and p in corpus]
        others = [corpus[p] for p in ids if p in corpus and not judged.get(p)]
        if good and others:
            rng = random.Random(f"{seed} {query}")
            drawn = [rng.choice(good), *rng.sample(others, min(2, len(others)))]
            lists[query] = GradedList(query, queries[query], drawn, [3, 1, 1][: len(drawn)])
    lacking = [query for query in qrels if query not in lists]
    report_unusable(
        path_or_hub_id, lacking, len(qrels), "queries lack a positive or another passage, left out"
    )
    return list(lists.values())


def combine(synthetic: Lists, real: Lists) -> Lists:
    """Synthetic + real: a query's real passages behind its synthetic ones (4 + 3: k = 7).

    Joined by the query's text less case and superfluous spaces.  Without a partner a synthetic
    list stays as it is, and a real one is left out, counted on stderr.  Raises ValueError if none
    has one.
    """
    partners = {plain_query(item.query): item for item in reversed(real)}
    joined = []
    unused = {item.id for item in real}
    for item in synthetic:
        partner = partners.get(plain_query(item.query))
        if partner:
            unused.discard(partner.id)
            passages = item.passages + partner.passages
            item = replace(item, passages=passages, grades=item.grades + partner.grades)
        joined.append(item)
    report_unusable(
        "combine", sorted(unused), len(real), "real lists have no synthetic partner, left out"
    )
    return joined
