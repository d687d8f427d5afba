"""The bi-encoder: one transformer, a (weighted) mean over its token states, one vector a text.

Query and passage go through the same network; the score of a pair is the dot product of their
vectors.  A model is saved as a sentence-transformers folder, see `repro.support.folders`.
"""

import hashlib
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import trange
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from repro.support.folders import read_folder, write_folder
from repro.support.models import cached, load_pretrained, model_folder, pick_device, pick_dtype

ROWS_ON_CPU = 16  # texts trained together; 64, padded to the longest, hold 1.4 x the tokens
BLOCK = 1024  # texts in one file of kept vectors: half a minute of work on two cores
WORTH_A_FILE = 64  # texts; fewer are sooner computed again
PLAIN_LENGTH = 256  # tokens of a text for a plain transformer, as released
KEPT = {}  # {settings: {prompt + text: mean vector (hidden,)}}


class BiEncoder(nn.Module):
    """Transformer -> weighted mean over tokens -> minus centre -> linear map -> length 1.

        e(x) = W (sum_t w[x_t] h_t / sum_t w[x_t] - c),   then e / |e| if `normalise`

    with h_t the last layer's states.  Options that Contriever and its kind do not need:
    `token_weights` w (V,), which make rare tokens count more, `centre` c (hidden,), `projection`
    W (m, hidden), the linear map, and `prompts` {"query", "passage"} in front of the texts (E5's
    "query: ").  `pooling="cls"` takes the first token's state for the mean.  `max_length` counts
    tokens, special ones included; None cuts nothing.  ValueError for another pooling.

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
        prompts: dict | None = None,
    ) -> None:
        super().__init__()
        if pooling not in ("mean", "cls"):
            raise ValueError(f"pooling: expected mean or cls, found {pooling!r}")
        model.config.use_cache = False  # a causal model would keep keys that nobody reads
        model.pooler = None  # BERT's is not part of e(x), and DDP wants a gradient for all
        model.requires_grad_(projection is None)
        self.model = model
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.normalise = normalise
        self.max_length = max_length
        self.prompts = prompts or {"query": "", "passage": ""}
        self.register_buffer("token_weights", token_weights)
        self.register_buffer("centre", centre)
        self.projection = None if projection is None else nn.Parameter(projection)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def frozen(self) -> bool:
        """Whether only a linear map trains."""
        return self.projection is not None

    def prompted(self, texts: list, kind: str) -> list:
        """The prompt of `kind` (query or passage) in front of each text; ValueError for others."""
        if isinstance(texts, str) or kind not in self.prompts:
            raise ValueError(
                "expected a list of texts of kind query or passage, "
                f"found {type(texts).__name__} of kind {kind!r}"
            )
        return [self.prompts[kind] + text for text in texts]

    def forward(self, queries: list, passages: list, chunk: int | None = None) -> tuple:
        """(n, d) and (m, d) embeddings with gradient, in one call, as DDP wants one a step.

        With `chunk`, so many texts are embedded at a time and only their embeddings are kept; the
        backward pass computes the rest again (gradient caching, Gao et al. 2021, arXiv 2101.06983).
        """
        return self.embed(queries, "query", chunk), self.embed(passages, "passage", chunk)

    def embed(self, texts: list, kind: str, chunk: int | None = None) -> Tensor:
        """(n, d) embeddings with gradient."""
        if self.frozen:
            means = self.mean_vectors(texts, kind)
        else:
            rows = ROWS_ON_CPU if self.device.type == "cpu" else len(texts)
            means = self._means(self.prompted(texts, kind), chunk or rows, chunk is not None)
        return self._finish(means)

    def _means(self, texts: list, rows: int, again: bool = False) -> Tensor:
        """(n, hidden) of texts that have their prompt, so many rows at a time, alike in length.

        With gradient.  With `again` the states are not kept for it but computed once more.
        """
        cut = self.max_length is not None
        encoded = self.tokenizer(texts, truncation=cut, max_length=self.max_length)
        ids = [row or [self.tokenizer.pad_token_id] for row in encoded.input_ids]
        # The longest first: too large a batch fails at once.
        order = torch.tensor([-len(row) for row in ids]).argsort(stable=True)
        step = self._mean
        if again:
            step = partial(checkpoint, step, use_reentrant=False)
        parts = [step([ids[row] for row in some]) for some in order.split(rows)]
        return torch.cat(parts)[order.argsort()]

    def _mean(self, ids: list) -> Tensor:
        """(n, hidden) weighted means of the last layer's states, float32."""
        padded = self.tokenizer.pad(
            {"input_ids": ids},
            padding_side="right",
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)  # (n, L) each
        hidden = self.model(**padded).last_hidden_state.float()  # (n, L, hidden)
        if self.pooling == "cls":
            return hidden[:, 0]
        weights = padded.attention_mask.float()
        if self.token_weights is not None:
            weights = weights * self.token_weights[padded.input_ids]
        total = weights.sum(1, keepdim=True).clamp(min=1e-9)  # sentence-transformers' guard
        with torch.autocast(self.device.type, enabled=False):  # the mean stays in float32
            return torch.einsum("nl,nlh->nh", weights, hidden) / total

    def _finish(self, vectors: Tensor) -> Tensor:
        """(n, hidden) means -> (n, d) embeddings, on the encoder's device."""
        vectors = vectors.to(self.device)
        if self.centre is not None:
            vectors = vectors - self.centre
        if self.frozen:
            vectors = vectors @ self.projection.T  # (n, m)
        if self.normalise:
            vectors = nn.functional.normalize(vectors)
        return vectors

    @torch.no_grad()
    def encode(
        self, texts: list, kind: str = "passage", batch_size: int = 32, progress: bool = False
    ) -> Tensor:
        """(n, d) embeddings of query or passage texts, float32, on the CPU, in the order given."""
        means = self.mean_vectors(texts, kind, batch_size, progress)
        return self._finish(means).cpu()

    @torch.no_grad()
    def mean_vectors(
        self, texts: list, kind: str, batch_size: int = 32, progress: bool = False
    ) -> Tensor:
        """(n, hidden) mean vectors, before centre and map, on the CPU.

        Those of a frozen transformer are computed once: they stay in memory, and blocks of texts
        on disk, so that the next process reads them too.
        """
        texts = self.prompted(texts, kind)
        if not texts:
            return torch.empty(0, self.model.config.hidden_size)
        kept = KEPT.setdefault(self._settings(), {}) if self.frozen else {}
        was_training = self.model.training
        self.model.eval()  # no dropout
        unique = list(dict.fromkeys(texts))
        for first in trange(0, len(unique), BLOCK, desc=f"encode {kind}", disable=not progress):
            block = unique[first : first + BLOCK]
            if set(block) - kept.keys():
                kept.update(zip(block, self._block(block, batch_size), strict=True))
        self.model.train(was_training)
        return torch.stack([kept[text] for text in texts])

    def _block(self, texts: list, batch_size: int) -> Tensor:
        """(n, hidden) mean vectors, on the CPU, from their file if they are to be kept on disk."""
        if not self.frozen or len(texts) < WORTH_A_FILE:
            return self._means(texts, batch_size).cpu()
        content = f"{self._settings()} {texts}"
        name = hashlib.sha256(content.encode()).hexdigest()
        folder = cached(
            f"vectors/{name}",
            lambda new: np.save(new / "vectors.npy", self._means(texts, batch_size).cpu()),
        )
        return torch.from_numpy(np.load(folder / "vectors.npy"))

    def _settings(self) -> str:
        """All that a frozen transformer's mean vectors depend on, but for the texts."""
        return (
            f"{self._fingerprint} {self.tokenizer.split_special_tokens} "
            f"{self.tokenizer.pad_token_id} {self.max_length} {self.tokenizer.truncation_side} "
            f"{self.pooling} {self.model.dtype} {self.device}"
        )

    @cached_property
    def _fingerprint(self) -> str:
        """Hex sha256 of tokenizer, config and weights; computed once, as none of them trains."""
        tokenizer = self.tokenizer.backend_tokenizer
        tokenizer.no_truncation()  # an earlier call leaves its own there
        tokenizer.no_padding()
        content = tokenizer.to_str() + self.model.config.to_json_string()
        digest = hashlib.sha256(content.encode())
        for name, weight in self.state_dict().items():
            if name not in ("centre", "projection"):
                digest.update(weight.cpu().float().flatten().numpy())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> Path:
        """Write a sentence-transformers folder; it must not exist or be empty.  Returns it."""
        return write_folder(self, Path(folder))

    @classmethod
    def load(
        cls,
        path_or_name: str | Path,
        device: str = "auto",
        dtype: str = "float32",
        query_prompt: str | None = None,
        passage_prompt: str | None = None,
    ) -> "BiEncoder":
        """A sentence-transformers folder or plain checkpoint, a built-in name, "base", a hub id.

        A plain transformer gets mean pooling and raw dot products, as Contriever has them.  With
        dtype "auto" a model with a linear map is float32, since its vectors are kept.  A prompt
        that is not None takes the place of the model's own.  Raises ValueError if it cannot be
        loaded or asks for what this kit does not have.
        """
        from repro.support.start import base_folder  # here, since it is built with this class

        target = pick_device(device)
        number_format = pick_dtype(dtype, target, encoding=True)
        name = str(path_or_name)
        folder = base_folder() if name == "base" else model_folder(name)
        options, root = read_folder(folder)
        if dtype == "auto" and "projection" in options:
            number_format = torch.float32
        model = load_pretrained(root, name=name, dtype=number_format)
        tokenizer = load_pretrained(root, AutoTokenizer, name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        longest = options.get("max_length") or tokenizer.model_max_length
        if "pooling" not in options:
            longest = min(longest, PLAIN_LENGTH)
        options["max_length"] = text_limit(model, longest)
        if query_prompt is not None:
            options["prompts"]["query"] = query_prompt
        if passage_prompt is not None:
            options["prompts"]["passage"] = passage_prompt
        return cls(model, tokenizer, **options).to(target).eval()


def text_limit(model: PreTrainedModel, asked: int) -> int | None:
    """Tokens a text may have: what is asked for, or fewer if the model has fewer positions.

    RoBERTa and its kind count positions from the padding index + 1.  What is below 1 or beyond
    1e9 (so tokenizers write "endless") is no limit, as are the positions of models that count
    distances, such as T5.
    """
    positions = getattr(model.config, "max_position_embeddings", 0)
    table = dict(model.named_modules()).get("embeddings.position_embeddings")
    padding = getattr(table, "padding_idx", None)
    if padding is not None:
        positions -= padding + 1
    finite = [limit for limit in (asked, positions) if 1 <= limit < 1e9]
    return min(finite, default=None)
