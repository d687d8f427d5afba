"""The bi-encoder: one transformer, a (weighted) mean over its token states, one vector a text.

Query and passage go through the same network; the score of a pair is the dot product of their
vectors.  A model is saved as a sentence-transformers folder, see `repro.support.folders`.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import trange
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from repro.support.folders import read_folder, write_folder
from repro.support.models import cached, load_pretrained, model_folder, pick_device, pick_dtype

ROWS_ON_CPU = 16  # texts trained together; 64, padded to the longest, hold 1.4 x the tokens
BLOCK = 1024  # texts in one file of kept vectors: half a minute of work on two cores
WORTH_A_FILE = 64  # texts; fewer are sooner computed again
PLAIN_LENGTH = 256  # tokens of a text for a plain transformer, as released
Texts = list[str]
KEPT: dict[str, dict[str, Tensor]] = {}  # {settings: {prompt + text: mean vector (hidden,)}}


class BiEncoder(nn.Module):
    """Transformer -> weighted mean over tokens -> minus centre -> linear map -> length 1.

        e(x) = W (sum_t w[x_t] h_t / sum_t w[x_t] - c),   then e / |e| if `normalise`

    with h_t the last layer's states.  Options that Contriever and its kind do not need:
    `token_weights` w (V,), which make rare tokens count more, `centre` c (hidden,), `projection`
    W (m, hidden), the linear map, and `prompts` {"query", "passage"} in front of the texts (E5's
    "query: ").  `pooling="cls"` takes the first token's state for the mean.  `max_length` counts
    tokens, special ones included; None cuts nothing.

    With a linear map only the map trains: the transformer is `frozen`, and a text's mean vector is
    computed once.  Without one the whole transformer trains.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pooling: str = "mean",
        normalise: bool = False,
        token_weights: Tensor | None = None,
        centre: Tensor | None = None,
        projection: Tensor | None = None,
        max_length: int | None = PLAIN_LENGTH,
        prompts: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        model.config.use_cache = False  # a causal model would keep keys that nobody reads
        model.pooler = None  # BERT's is not part of e(x), and DDP wants a gradient for all
        self.model = model
        self.tokenizer = tokenizer
        self.pad = tokenizer.pad_token_id or 0
        self.pooling = pooling
        self.normalise = normalise
        self.max_length = max_length
        self.prompts = prompts or {"query": "", "passage": ""}
        self.register_buffer("token_weights", token_weights)
        self.register_buffer("centre", centre)
        self.projection = None if projection is None else nn.Parameter(projection)
        if self.frozen:
            model.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def frozen(self) -> bool:
        """Whether only a linear map trains."""
        return self.projection is not None

    def trainable(self) -> list[nn.Parameter]:
        """What training changes: the linear map, or else every weight of the transformer."""
        return [self.projection] if self.frozen else list(self.model.parameters())

    def prompted(self, texts: Texts, kind: str) -> list[str]:
        """The prompt of `kind` (query or passage) in front of each text; ValueError for others."""
        if isinstance(texts, str) or kind not in self.prompts:
            found = f"{type(texts).__name__} of kind {kind!r}"
            raise ValueError(f"expected a list of texts of kind query or passage, found {found}")
        return [self.prompts[kind] + text for text in texts]

    def forward(
        self, queries: Texts, passages: Texts, chunk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(n, d) and (m, d) embeddings with gradient, in one call, as DDP wants one a step.

        With `chunk`, so many texts are embedded at a time and only their embeddings are kept; the
        backward pass computes the rest again (gradient caching, Gao et al. 2021, arXiv 2101.06983).
        """
        return self.embed(queries, "query", chunk), self.embed(passages, "passage", chunk)

    def embed(self, texts: Texts, kind: str, chunk: int | None = None) -> Tensor:
        """(n, d) embeddings with gradient."""
        if self.frozen:
            means = self.mean_vectors(texts, kind).to(self.device)
        else:
            rows = ROWS_ON_CPU if self.device.type == "cpu" else len(texts)
            means = self._means(self.prompted(texts, kind), chunk or rows, chunk is not None)
        return self._finish(means)

    def _means(self, texts: Texts, rows: int, again: bool = False) -> Tensor:
        """(n, hidden) of texts that have their prompt, so many rows at a time, alike in length.

        With gradient.  With `again` the states are not kept for it but computed once more.
        """
        cut = self.max_length is not None
        rows_of_ids = self.tokenizer(texts, truncation=cut, max_length=self.max_length)["input_ids"]
        ids = [row or [self.pad] for row in rows_of_ids]  # a text has at least one
        lengths = torch.tensor([len(row) for row in ids])
        order = lengths.argsort(descending=True, stable=True)  # too large a batch fails at once
        parts = []
        for some in order.split(rows):
            part = [ids[row] for row in some]
            if again:
                parts.append(checkpoint(self._mean, part, use_reentrant=False))
            else:
                parts.append(self._mean(part))
        return torch.cat(parts)[order.argsort()]

    def _mean(self, ids: list[list[int]]) -> Tensor:
        """(n, hidden) weighted means of the last layer's states, float32."""
        rows = [torch.tensor(row) for row in ids]
        ones = [torch.ones_like(row) for row in rows]
        padded = pad_sequence(rows, True, self.pad).to(self.device)  # (n, L), filled on the right
        mask = pad_sequence(ones, True).to(self.device)
        hidden = self.model(input_ids=padded, attention_mask=mask).last_hidden_state
        with torch.autocast(self.device.type, enabled=False):  # the mean stays in float32
            hidden = hidden.float()  # (n, L, hidden)
            weights = mask.float()
            if self.pooling == "cls":
                return hidden[:, 0]
            if self.token_weights is not None:
                weights = weights * self.token_weights[padded]
            total = weights.sum(dim=1, keepdim=True).clamp(min=1e-9)  # sentence-transformers' guard
            return (weights.unsqueeze(1) @ hidden).squeeze(1) / total

    def _finish(self, vectors: Tensor) -> Tensor:
        """(n, hidden) means -> (n, d) embeddings."""
        with torch.autocast(self.device.type, enabled=False):
            if self.centre is not None:
                vectors = vectors - self.centre
            if self.projection is not None:
                vectors = vectors @ self.projection.T  # (n, m)
            if self.normalise:
                vectors = nn.functional.normalize(vectors, dim=1)
            return vectors

    @torch.no_grad()
    def encode(
        self, texts: Texts, kind: str = "passage", batch_size: int = 32, progress: bool = False
    ) -> Tensor:
        """(n, d) embeddings of query or passage texts, float32, on the CPU, in the order given."""
        means = self.mean_vectors(texts, kind, batch_size, progress)
        return self._finish(means.to(self.device)).cpu()

    @torch.no_grad()
    def mean_vectors(
        self, texts: Texts, kind: str, batch_size: int = 32, progress: bool = False
    ) -> Tensor:
        """(n, hidden) mean vectors, before centre and map, on the CPU.

        Those of a frozen transformer are computed once: they stay in memory, and blocks of texts
        on disk, so that the next process reads them too.
        """
        texts = self.prompted(texts, kind)
        if not texts:
            return torch.empty(0, self.model.config.hidden_size)
        kept = KEPT.setdefault(self._settings(), {}) if self.frozen else {}
        was_training = self.training
        self.eval()  # no dropout
        unique = list(dict.fromkeys(texts))
        for first in trange(0, len(unique), BLOCK, desc=f"encode {kind}", disable=not progress):
            block = unique[first : first + BLOCK]
            if not kept.keys() >= set(block):
                kept.update(zip(block, self._block(block, batch_size), strict=True))
        self.train(was_training)
        return torch.stack([kept[text] for text in texts])

    def _block(self, texts: Texts, batch_size: int) -> Tensor:
        """(n, hidden) mean vectors, on the CPU, from their file if they are to be kept on disk."""

        def build(folder: Path) -> None:
            np.save(folder / "vectors.npy", self._means(texts, batch_size).cpu())

        if not self.frozen or len(texts) < WORTH_A_FILE:
            return self._means(texts, batch_size).cpu()
        content = json.dumps([self._settings(), texts])
        name = hashlib.sha256(content.encode()).hexdigest()
        folder = cached(f"vectors/{name}", build)
        return torch.from_numpy(np.load(folder / "vectors.npy"))

    def _settings(self) -> str:
        """All that a frozen transformer's mean vectors depend on, but for the texts."""
        cut = f"{self.max_length} {self.tokenizer.truncation_side}"
        return f"{self._fingerprint} {self.pooling} {cut} {self.model.dtype} {self.device}"

    @cached_property
    def _fingerprint(self) -> str:
        """Hex sha256 of tokenizer, config and weights; computed once, as none of them trains."""
        tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
        tokenizer |= {"truncation": None, "padding": None}  # left there by an earlier call
        config = {**self.model.config.to_dict(), "_name_or_path": ""}  # wherever it lies
        parts = [tokenizer, self.tokenizer.split_special_tokens, self.pad, config]
        content = json.dumps(parts, sort_keys=True, default=str)
        digest = hashlib.sha256(content.encode())
        for name, weight in self.state_dict().items():
            if name not in ("centre", "projection"):
                digest.update(weight.cpu().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> Path:
        """Write a sentence-transformers folder; it must not exist or be empty.  Returns it."""
        return write_folder(self, Path(folder))

    @classmethod
    def load(
        cls, path_or_name: str | Path, device: str = "auto", dtype: str = "float32"
    ) -> "BiEncoder":
        """A sentence-transformers folder or plain checkpoint, a built-in name, "base", a hub id.

        A plain transformer gets mean pooling and raw dot products, as Contriever has them.  Raises
        ValueError if it cannot be loaded or asks for what this kit does not have.
        """
        target = pick_device(device)
        number_format = pick_dtype(dtype, target, encoding=True)
        name = str(path_or_name)
        if name == "base":
            from repro.support import start  # here, since it is built with this class

            folder = start.base_folder()
        else:
            folder = model_folder(name)
        options, root = read_folder(folder)
        model = load_pretrained(root, name=name, dtype=number_format)
        tokenizer = load_pretrained(root, AutoTokenizer, name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        longest = options.get("max_length") or tokenizer.model_max_length
        if "pooling" not in options:
            longest = min(longest, PLAIN_LENGTH)
        options["max_length"] = text_limit(model, longest)
        return cls(model, tokenizer, **options).to(target).eval()


def text_limit(model: PreTrainedModel, asked: int) -> int | None:
    """Tokens a text may have: what is asked for, or fewer if the model has fewer positions.

    RoBERTa and its kind count positions from the padding index + 1.  What is below 1 or beyond
    1e9 (so tokenizers write "endless") is no limit, as are the positions of models that count
    distances, such as T5.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    embeddings = getattr(model, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    if padding is not None:
        positions = table.num_embeddings - padding - 1
    finite = [limit for limit in (asked, positions) if limit and 1 <= limit < 1e9]
    return min(finite, default=None)


def set_dropout(model: PreTrainedModel, p: float) -> None:
    """Let a transformer drop each unit with probability `p` in training; 0 drops none.

    Sets every `nn.Dropout`, the numbers named dropout that attention layers read for themselves,
    and those of the config, so that a saved model says what it was trained with.
    """
    for module in [*model.modules(), model.config]:
        if isinstance(module, nn.Dropout):
            module.p = p
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, p)
