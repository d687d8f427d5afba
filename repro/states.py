"""What the frozen layers make of texts: computed once, then shared by every step, run and collection.

Where some layers are frozen, their output is one vector a token and stays in memory.  Where all are,
only the mean over the tokens is needed, one vector a text: small enough for the disk too, in blocks,
under a name made from the weights, the pooling and the texts.  A stopped run goes on with the next
block, and a second run, with other seeds or losses, reads instead of computing.
"""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from repro.checkpoints import built_once

BLOCK = 1024  # texts in one file: half a minute of work on two cores, which is what a kill can cost


@dataclass
class Tokens:
    """n texts as token ids, with what the frozen layers made of them, if that is kept."""

    ids: list[list[int]]  # n lists of 1..max_length ids
    states: list[Tensor] | None = None  # n tensors (length, hidden): what leaves the frozen lower layers
    pooled: Tensor | None = None  # (n, hidden): the mean over tokens, kept where all layers are frozen

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | Sequence[int]) -> "Tokens":
        rows = list(range(len(self))[rows]) if isinstance(rows, slice) else rows
        pooled = None if self.pooled is None else self.pooled[rows]
        return Tokens([self.ids[r] for r in rows], self.states and [self.states[r] for r in rows], pooled)


def joined(parts: Sequence[Tokens]) -> Tokens:
    """Several groups of the same kind, one behind the other."""
    pooled = None if parts[0].pooled is None else torch.cat([part.pooled for part in parts])
    states = None if parts[0].states is None else [states for part in parts for states in part.states]
    return Tokens([ids for part in parts for ids in part.ids], states, pooled)


def fingerprint(encoder: Any) -> str:
    """Hex sha256 of all that the pooled vectors depend on: transformer, pooling, token weights, length limit, vocabulary."""
    digest = hashlib.sha256()
    digest.update(repr((encoder.pooling, encoder.max_length, type(encoder.model).__name__)).encode())
    if encoder.device.type != "cpu":  # each kind of device rounds in its own way
        digest.update(encoder.device.type.encode())
    digest.update(repr(sorted(encoder.tokenizer.get_vocab().items())).encode())
    weights = dict(encoder.model.state_dict())
    if encoder.token_weights is not None:
        weights["token_weights"] = encoder.token_weights
    for name in sorted(weights):
        digest.update(f"{name} {weights[name].dtype} {tuple(weights[name].shape)}".encode())
        digest.update(weights[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class StateBank:
    """Texts to `Tokens` with what the frozen layers made of them; call it as `bank(texts, kind)`.

    What `add` was told beforehand is looked up; any other text is tokenised and runs through all
    layers.  `folder` keeps pooled vectors on disk; without it, and for token states, memory only.
    """

    def __init__(self, encoder: Any, folder: Path | None = None, state_gb: float = 8.0, progress: bool = True) -> None:
        self.encoder, self.folder, self.state_gb, self.progress = encoder, folder, state_gb, progress
        self.gb = 0.0
        self.rows: dict[str, dict[str, int]] = {}
        self.parts: dict[str, list[Tokens]] = {}
        self.print = fingerprint(encoder) if folder is not None and encoder.all_frozen else ""

    def add(self, texts: Sequence[str], kind: str) -> None:
        """Compute, or read from disk, what the frozen layers make of these texts.

        Token states that do not fit in `state_gb` are not kept: stderr says so, and the frozen layers
        run again whenever the texts are used.
        """
        if not self.encoder.frozen:
            return
        known, unique = self.rows.setdefault(kind, {}), list(dict.fromkeys(texts))
        # Blocks are cut from the texts as given, not from what is missing: the same collection gives the same files.
        size = BLOCK if self.encoder.all_frozen else max(1, len(unique))
        blocks = [unique[start : start + size] for start in range(0, len(unique), size)]
        blocks = [block for block in blocks if any(text not in known for text in block)]
        silent = not self.progress or not self.encoder.all_frozen or len(blocks) < 2
        for block in tqdm(blocks, desc=f"frozen layers, {kind}", unit="block", disable=silent):
            new = [row for row, text in enumerate(block) if text not in known]
            found = self._found(block, new, kind)
            if found is None:
                continue
            known.update({block[row]: place for place, row in enumerate(new, start=len(known))})
            self.parts.setdefault(kind, []).append(found)

    def _found(self, block: list[str], new: list[int], kind: str) -> Tokens | None:
        """What is kept of the texts of a block that are not known yet; None if it does not fit."""
        if self.encoder.all_frozen:
            return Tokens([[] for _ in new], pooled=self._block(block, kind)[new])
        tokens = self.encoder.tokenise([block[row] for row in new], kind)
        count = sum(map(len, tokens.ids))
        size = count * self.encoder.model.config.hidden_size * self.encoder.model.dtype.itemsize / 1e9
        if self.gb + size > self.state_gb:
            print(
                f"the frozen layers' states of {count} tokens need {size:.1f} GB, more than is left of the "
                f"{self.state_gb:g} GB allowed (state_gb); they are computed again in every step instead",
                file=sys.stderr,
            )
            return None
        self.gb += size
        return self.encoder.keep_states(tokens, progress=self.progress)

    def _block(self, texts: list[str], kind: str) -> Tensor:
        """(n, d) pooled vectors of one block, from its file if there is one."""

        def compute() -> Tensor:
            pooled = self.encoder.keep_states(self.encoder.tokenise(texts, kind)).pooled
            assert pooled is not None  # all layers are frozen
            return pooled

        if self.folder is None:
            return compute()
        key = repr((self.print, self.encoder.prompts[kind], texts))
        path = self.folder / hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        with built_once(path) as scratch:
            if scratch is not None:
                save_file({"pooled": compute()}, scratch / "block.safetensors")
        return load_file(path / "block.safetensors")["pooled"]

    def __call__(self, texts: Sequence[str], kind: str) -> Tokens:
        rows = self.rows.get(kind, {})
        if any(text not in rows for text in texts):
            return self.encoder.tokenise(texts, kind)
        if len(self.parts[kind]) > 1:
            self.parts[kind] = [joined(self.parts[kind])]
        return self.parts[kind][0][[rows[text] for text in texts]]


class FromStates:
    """An encoder whose texts come through a bank; `evaluate_model` and `retrieve` take it in place of the encoder."""

    def __init__(self, encoder: Any, bank: StateBank) -> None:
        self.encoder, self.bank, self.device = encoder, bank, encoder.device

    def encode(self, texts: Sequence[str], kind: str = "passage", batch_size: int = 32, progress: bool = False) -> Tensor:
        """`BiEncoder.encode`: the same vectors.  Where all layers are frozen, new texts join the bank."""
        if not self.bank.encoder.all_frozen:
            return self.encoder.encode_tokens(self.bank(list(texts), kind), batch_size, progress)
        self.bank.add(texts, kind)
        return self.encoder.encode_tokens(self.bank(list(texts), kind), 4096)  # only a matrix product is left to do
