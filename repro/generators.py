"""Who writes the replies: a local language model, or a server that speaks the OpenAI protocol.

Both answer `reply(chats, keys, sampling)`: one text a chat, where the key seeds the randomness of
that chat alone.  The local model finds its batch size from a memory limit, and halves it, with a
notice, when memory runs out.  The server is how a model is used that does not fit here (vLLM, the
llama.cpp server, TGI): requests go out side by side, are repeated when the server is busy, and the
API key is read from OPENAI_API_KEY and written nowhere.
"""

import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from repro.checkpoints import load_pretrained, pick_device, pick_dtype
from repro.decode import decode, quick_head, row_noise

Chat = list[dict[str, str]]
MOST_ROWS = {"cpu": 64}  # more rows than this gain nothing on a CPU
MOST_ROWS_ELSEWHERE = 256


class GenerateError(ValueError):
    """A run that cannot start or go on: a bad query, model, prompt or server."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; `top_k` 0 means all tokens, temperature 0 the likeliest token."""

    max_new_tokens: int = 100
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 50

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise GenerateError(
                f"sampling: expected max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1, got {self}"
            )


def free_memory(device: torch.device) -> int:
    """Bytes that can still be used on a device (the system's estimate on the CPU)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 4 * 1024**3


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


class LocalGenerator:
    """A causal language model on this machine; make one with `load_generator`."""

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        batch_size: int | None = None,
        memory_gb: float | None = None,
        plain: bool = False,
    ) -> None:
        self.name, self.model, self.tokenizer = name, model.eval(), tokenizer
        self.batch_size, self.memory_gb, self.plain = batch_size, memory_gb, plain
        self.batch_limit: int | None = None  # set when memory ran out
        quick_head(model)
        if not plain and not tokenizer.chat_template:
            raise GenerateError(
                f"{name}: the tokenizer has no chat template; use --no-chat-template for plain text"
            )
        ends = model.generation_config.eos_token_id if model.generation_config else None
        ends = ends if isinstance(ends, list) else [ends]
        self.stop = {token for token in [*ends, tokenizer.eos_token_id] if token is not None}
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize

    def prompt_ids(self, chat: Chat) -> list[int]:
        """Token ids of a chat, ready for the model's turn."""
        if self.plain:
            return self.tokenizer("\n\n".join(turn["content"] for turn in chat) + "\n\n")["input_ids"]
        try:
            ids = self.tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:  # the template is a program that came with the model
            raise GenerateError(
                f"{self.name}: its chat template refuses this prompt: {str(error)[:200]}"
            ) from error
        return list(ids)

    def check(self, where: str, chat: Chat, sampling: Sampling) -> int:
        """The prompt's length in tokens; GenerateError if prompt and reply do not fit the context window."""
        length = len(self.prompt_ids(chat))
        if length + sampling.max_new_tokens > self.context:
            raise GenerateError(
                f"{where}: the prompt has {length} tokens, which with {sampling.max_new_tokens} new ones "
                f"exceeds the model's context of {self.context}"
            )
        return length

    def rows(self, longest: int, sampling: Sampling) -> int:
        """How many prompts of `longest` tokens make one batch: as asked for, or what the memory limit allows.

        A row needs its keys and values (twice, while rows are moved), the logits, and the activations
        of its prompt.  Without --memory-gb the limit is 60 % of the free memory.
        """
        if self.batch_size:
            return self.batch_size
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        item = self.model.dtype.itemsize
        positions = longest + sampling.max_new_tokens
        cache = 2 * 2 * config.num_hidden_layers * heads * size * item * positions
        row = cache + 12 * config.vocab_size + 16 * item * config.hidden_size * longest
        if self.memory_gb:
            weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
            free = self.memory_gb * 1024**3 - weights
            if free < row:
                raise GenerateError(
                    f"--memory-gb {self.memory_gb:g}: the weights take {weights / 1024**3:.2f} GB "
                    f"and one row {row / 1024**3:.2f} GB; give more memory"
                )
        else:
            free = 0.6 * free_memory(self.model.device)
        return max(1, min(MOST_ROWS.get(self.model.device.type, MOST_ROWS_ELSEWHERE), int(free / row)))

    def reply(
        self,
        chats: Sequence[Chat],
        keys: Sequence[str],
        sampling: Sampling,
        on_step: Callable[[int], None] | None = None,
    ) -> list[str]:
        """One reply a chat.  If memory runs out the batch is halved, with a notice, down to one row."""
        prompts = [self.prompt_ids(chat) for chat in chats]
        for key, prompt in zip(keys, prompts, strict=True):
            if len(prompt) + sampling.max_new_tokens > self.context:
                raise GenerateError(
                    f"{key}: {len(prompt)} tokens and the reply exceed the context of {self.context}"
                )
        noise = torch.stack([row_noise(key, sampling.max_new_tokens) for key in keys])
        options = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        ids: list[list[int]] = []
        while len(ids) < len(prompts):
            start, end = len(ids), len(ids) + (self.batch_limit or len(prompts))
            try:
                ids += decode(
                    self.model, prompts[start:end], noise[start:end], self.stop, on_step=on_step, **options
                )
                continue
            except (RuntimeError, MemoryError) as error:
                count = min(end, len(prompts)) - start
                if not is_out_of_memory(error):
                    raise
                if count == 1:
                    raise GenerateError(
                        f"{self.name}: memory ran out with a single prompt in the batch"
                    ) from error
                self.batch_limit = (count + 1) // 2
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()
            print(
                f"memory ran out with {count} prompts a batch; going on with {self.batch_limit}",
                file=sys.stderr,
            )
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)


def load_generator(
    name: str = "smollm2-135m",
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    memory_gb: float | None = None,
    plain: bool = False,
) -> LocalGenerator:
    """A local model by built-in name, folder or hub id.  Raises CheckpointError or GenerateError."""
    where = pick_device(device)
    model = load_pretrained(name, AutoModelForCausalLM, dtype=pick_dtype(dtype, where)).to(where)
    shown = Path(name).name if Path(name).is_dir() else str(name)  # no machine's folders in the records
    return LocalGenerator(shown, model, load_pretrained(name, AutoTokenizer), batch_size, memory_gb, plain)


class ServerGenerator:
    """A model behind an OpenAI-compatible endpoint, e.g. base_url http://127.0.0.1:8000/v1."""

    def __init__(
        self,
        base_url: str,
        model: str,
        workers: int = 8,
        timeout: float = 120.0,
        tries: int = 5,
        pause: float = 1.0,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise GenerateError(
                f"--base-url {base_url!r}: expected an address that starts with http:// or https://"
            )
        self.name, self.url = model, base_url.rstrip("/") + "/chat/completions"
        self.workers, self.timeout, self.tries, self.pause = workers, timeout, tries, pause

    def check(self, where: str, chat: Chat, sampling: Sampling) -> int:
        """A length to sort by (characters); whether it fits, only the server can tell."""
        return sum(len(turn["content"]) for turn in chat)

    def rows(self, longest: int, sampling: Sampling) -> int:
        """How many queries make one batch of the cache: two for each request that is under way."""
        return 2 * self.workers

    def reply(
        self,
        chats: Sequence[Chat],
        keys: Sequence[str],
        sampling: Sampling,
        on_step: Callable[[int], None] | None = None,
    ) -> list[str]:
        """One reply a chat, `workers` requests at a time.  GenerateError if one fails for good."""
        with ThreadPoolExecutor(self.workers) as pool:
            jobs = [pool.submit(self.one, chat, key, sampling) for chat, key in zip(chats, keys, strict=True)]
            try:
                return [job.result() for job in jobs]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def one(self, chat: Chat, key: str, sampling: Sampling) -> str:
        """One request; repeated with growing pauses on 429, 5xx and lost connections."""
        seed = int(row_noise(key, 1).item() * 2**31)
        body = {
            "model": self.name,
            "messages": chat,
            "max_tokens": sampling.max_new_tokens,
            "seed": seed,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        headers = {"Content-Type": "application/json"}
        secret = os.environ.get("OPENAI_API_KEY", "")
        if secret:
            headers["Authorization"] = f"Bearer {secret}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        reason = ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    content = json.loads(response.read())["choices"][0]["message"]["content"]
                if not isinstance(content, str):
                    raise TypeError("no text in the reply")
                return content
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}: {error.read(300).decode('utf-8', 'replace')}"
                if error.code != 429 and error.code < 500:
                    break
            except (OSError, urllib.error.URLError) as error:
                reason = f"no answer: {getattr(error, 'reason', error)}"
            except (ValueError, KeyError, IndexError, TypeError) as error:
                reason = f"the reply is not a chat completion: {type(error).__name__} {error}"
                break
        reason = " ".join(reason.replace(secret, "***").split() if secret else reason.split())
        raise GenerateError(f"{self.url}: gave no reply after {attempt + 1} tries, {reason}")
