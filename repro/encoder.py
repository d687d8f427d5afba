"""The bi-encoder: one transformer, a (weighted) mean over its token states, one vector a text.

Query and passage go through the same network; the score of a pair is the dot product of their two
vectors.  Four options matter for an encoder that was never trained for retrieval: weights that
make rare tokens count more in the mean, a centre (a mean embedding) that is subtracted, a linear map,
and normalisation to length 1, which turns the dot product into a cosine.  Contriever and its kind need
none of them.

A model is saved in the sentence-transformers folder format, so `SentenceTransformer(folder)` gives
the same vectors.  For cheap training the lower layers can be frozen and their states kept.
"""

import hashlib
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from repro import warmup
from repro.checkpoints import built_once, cache_dir, load_pretrained, pick_device, pick_dtype, sha256_of
from repro.folders import read_modules, save_folder
from repro.layers import freeze_layers, only_layers
from repro.lists import lists_from_jsonl
from repro.states import StateBank, Tokens

AUTHORED = Path(__file__).parents[1] / "cached_prompts" / "authored.jsonl"


# Texts embedded together while training on a CPU, neighbours in length.  A batch of 64 authored passages
# padded to its longest holds 1.42 times its tokens; in four parts of 16 it is 1.09.
ROWS_ON_CPU = 16


class BiEncoder(nn.Module):
    """Transformer -> weighted mean over tokens -> minus centre -> linear map -> length 1; all but the first are options.

        e(x) = W (sum_t w[x_t] h_t / sum_t w[x_t] - c),   then e / |e| if `normalise`

    with h_t the last layer's states, w = 1 for every token unless `token_weights` (V,) is given,
    c = 0 unless `centre` (d,) is given, and W = 1 unless `projection` (m, d) is given, the only one of
    them that is trained.  `prompts` are put in front of queries and passages (E5's "query: ").
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        pooling: str = "mean",
        token_weights: Tensor | None = None,
        centre: Tensor | None = None,
        projection: Tensor | None = None,
        normalise: bool = False,
        max_length: int = 256,  # the paper's length for queries and passages
        prompts: dict[str, str] | None = None,
    ):
        super().__init__()
        model.config.use_cache = False  # a causal model would keep keys and values that nobody reads
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # BERT's pooler is not part of e(x); DDP rejects parameters without gradient
        self.model, self.tokenizer = model, tokenizer
        self.pooling, self.normalise, self.max_length = pooling, normalise, max_length
        self.prompts = {"query": "", "passage": "", **(prompts or {})}
        self.frozen = 0  # how many lower layers are frozen
        self.register_buffer("token_weights", token_weights)
        self.register_buffer("centre", centre)
        self.projection = None if projection is None else nn.Parameter(projection.clone())

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def all_frozen(self) -> bool:
        """Whether no layer of the transformer trains, so that a text's mean vector never changes."""
        return self.frozen == self.model.config.num_hidden_layers

    def tokenise(self, texts: Sequence[str], kind: str = "passage") -> Tokens:
        """Texts to token ids, cut at `max_length`, the prompt of `kind` in front.  ValueError for another kind."""
        if kind not in self.prompts:
            raise ValueError(f"kind: expected one of {', '.join(sorted(self.prompts))}, got {kind!r}")
        if not len(texts):
            return Tokens([])
        prompted = [self.prompts[kind] + text for text in texts]
        ids = self.tokenizer(prompted, truncation=True, max_length=self.max_length)["input_ids"]
        empty = [self.tokenizer.pad_token_id or 0]  # a text without a single token still needs one position
        return Tokens([row or empty for row in ids])

    def forward(self, *groups: Tokens, chunk: int | None = None) -> tuple[Tensor, ...]:
        """One (n, d) matrix a group.  Queries and passages pass in one call, as DDP wants one call a step.

        With `chunk`, so many texts are embedded at a time and only their embeddings are kept; the
        backward pass computes the rest again (gradient caching, Gao et al. 2021, arXiv 2101.06983).
        """
        return tuple(self._embed_by_length(group, chunk) for group in groups)

    def _embed_by_length(self, tokens: Tokens, chunk: int | None) -> Tensor:
        rows = chunk or (ROWS_ON_CPU if self.device.type == "cpu" else len(tokens))
        order = sorted(range(len(tokens)), key=lambda row: len(tokens.ids[row]))
        run = partial(checkpoint, self.embed, use_reentrant=False) if chunk else self.embed
        parts = [run(tokens[order[start : start + rows]]) for start in range(0, len(order), rows)]
        return torch.cat(parts)[torch.tensor(order).argsort().to(self.device)]

    def embed(self, tokens: Tokens) -> Tensor:
        """(n, d) embeddings with gradient, starting from what is kept of the frozen layers, if anything is."""
        if tokens.pooled is not None:
            return self._finish(tokens.pooled.to(self.device))
        ids, mask = self._pad(tokens)
        if tokens.states is None:
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state  # (n, L, d)
        else:
            below = nn.utils.rnn.pad_sequence(tokens.states, batch_first=True).to(self.device)  # (n, L, d)
            with only_layers(self.model, self.frozen, None, entering=below):
                hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        with torch.autocast(self.device.type, enabled=False):  # the mean over tokens stays in float32
            return self._finish(self._pool(hidden.float(), ids, mask))

    def _pad(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Right-padded ids and attention mask, both (n, L)."""
        lengths = torch.tensor([len(row) for row in tokens.ids])
        rows = [torch.tensor(row) for row in tokens.ids]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id or 0)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return ids.to(self.device), mask.to(self.device)

    def _pool(self, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        if self.pooling == "cls":
            return hidden[:, 0]
        weights = mask.float()  # (n, L)
        if self.token_weights is not None:
            weights = weights * self.token_weights[ids]
        total = weights.sum(dim=1, keepdim=True).clamp(min=1e-9)  # sentence-transformers' guard
        return (weights.unsqueeze(1) @ hidden).squeeze(1) / total  # (n, d)

    def _finish(self, vectors: Tensor) -> Tensor:
        if self.centre is not None:
            vectors = vectors - self.centre
        if self.projection is not None:
            vectors = vectors @ self.projection.T  # (n, m)
        return nn.functional.normalize(vectors, dim=1) if self.normalise else vectors

    @torch.no_grad()
    def encode(
        self, texts: Sequence[str], kind: str = "passage", batch_size: int = 32, progress: bool = False
    ) -> Tensor:
        """Embeddings (n, d) of texts, float32, on the CPU, in the order given.

        `kind` is "query" or "passage".  Texts are sorted by length, longest first, so that a batch
        is padded as little as possible and a batch that does not fit in memory fails at once.
        """
        return self.encode_tokens(self.tokenise(texts, kind), batch_size, progress)

    @torch.no_grad()
    def encode_tokens(self, tokens: Tokens, batch_size: int = 32, progress: bool = False) -> Tensor:
        """`encode` for texts that are tokenised already, with or without kept states."""
        order = sorted(range(len(tokens)), key=lambda row: -len(tokens.ids[row]))
        was_training = self.training
        self.eval()
        width = self.model.config.hidden_size if self.projection is None else len(self.projection)
        vectors = torch.empty(len(tokens), width)
        with tqdm(total=len(tokens), desc="encode", unit="text", disable=not progress) as bar:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                vectors[rows] = self.embed(tokens[rows]).cpu()
                bar.update(len(rows))
        self.train(was_training)
        return vectors

    def freeze(self, layers: int) -> None:
        """Freeze the embeddings and the lowest `layers` layers; 0 leaves the whole model trainable.

        All layers can be frozen (and the final norm with them) if there is a projection, which then is
        what trains.  Raises ValueError if nothing is left to train.
        """
        freeze_layers(self.model, layers, all_of_them=self.projection is not None)
        self.frozen = layers

    @torch.no_grad()
    def keep_states(self, tokens: Tokens, batch_size: int = 32, progress: bool = False) -> Tokens:
        """The same tokens with what the frozen layers make of them: computed once, used in every step.

        Where all layers are frozen that is one mean vector a text, else the states of all its tokens.
        """
        states: list[Tensor] = [torch.empty(0)] * len(tokens)
        pooled = torch.empty(len(tokens), self.model.config.hidden_size)
        order = sorted(range(len(tokens)), key=lambda row: -len(tokens.ids[row]))
        self.eval()
        with tqdm(total=len(tokens), desc="frozen layers", unit="text", disable=not progress) as bar:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                ids, mask = self._pad(tokens[rows])
                if self.all_frozen:
                    hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
                    pooled[rows] = self._pool(hidden.float(), ids, mask).cpu()
                else:
                    with only_layers(self.model, 0, self.frozen) as leaving:
                        self.model(input_ids=ids, attention_mask=mask)
                    for row, hidden in zip(rows, leaving[-1].cpu(), strict=True):
                        states[row] = hidden[: len(tokens.ids[row])].clone()
                bar.update(len(rows))
        return Tokens(tokens.ids, pooled=pooled) if self.all_frozen else Tokens(tokens.ids, states)

    def save(self, folder: str | Path) -> Path:
        """Write the model as a sentence-transformers folder (safetensors); the folder must not exist or be empty.

        Modules: Transformer, WordWeights (the token weights), Pooling, Dense (identity with bias -c),
        Dense (W, no bias), Normalize; those that the model does not use are left out.
        """
        return save_folder(
            Path(folder),
            self.model,
            self.tokenizer,
            pooling=self.pooling,
            token_weights=self.token_weights,
            centre=self.centre,
            projection=self.projection,
            normalise=self.normalise,
            max_length=self.max_length,
            prompts=self.prompts,
        )

    @classmethod
    def load(cls, name: str | Path, device: str = "auto", dtype: str = "auto", **options: Any) -> "BiEncoder":
        """Load `base`, a built-in name, a folder (this kit's, sentence-transformers' or plain), or a hub id.

        `options` go to the constructor and win over what the folder says.  A plain transformer
        gets mean pooling and raw dot products, as the paper uses Contriever.  Raises
        CheckpointError if it cannot be loaded or needs a module that this kit does not have.
        """
        where = base_folder() if os.fspath(name) == "base" else name
        target = pick_device(device)
        found, subfolder = read_modules(where)
        kind = {"subfolder": subfolder} if subfolder else {}
        model = load_pretrained(where, AutoModel, dtype=pick_dtype(dtype, target), **kind)
        tokenizer = load_pretrained(where, AutoTokenizer, **kind)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        limit = getattr(model.config, "max_position_embeddings", None) or 256
        longest = tokenizer.model_max_length if found else 256  # where sentence-transformers keeps its limit now
        settings = {"max_length": min(longest, limit), **found, **options}
        return cls(model, tokenizer, **settings).to(target).eval()


# The built-in encoder, "base".  Nothing in it was trained on a relevance label, and no real document was used.
# What it is made of was chosen on the authored lists and WikiQA's training questions: see README.
BASE_CHECKPOINT, BASE_LAYERS, BASE_SEED = "smollm2-135m", 6, 0
BASE_PROMPT = "#\n"  # a causal model's first token is a sink for attention, and no word of the text should be it


def base_folder() -> Path:
    """The built-in encoder as a folder in the cache, made once (two minutes on two cores): no label is used.

    The lower 6 of SmolLM2-135M's 30 layers; a mean over tokens weighted by inverse frequency, counted
    on the authored passages, the start prompt left out; centred on the mean embedding of the authored
    queries (a query's few tokens share more of the constant part than a passage's many); a linear map
    that softly whitens the authored passages and then learns to find a passage from a few words cut
    out of it (`warmup`); cosine.
    """
    recipe = f"{BASE_CHECKPOINT} {BASE_LAYERS} {BASE_PROMPT!r} {warmup.RECIPE} {BASE_SEED} {sha256_of(AUTHORED)}"
    folder = cache_dir() / "models" / f"base-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    with built_once(folder) as scratch:
        if scratch is not None:
            print("building the self-supervised encoder `base` once", file=sys.stderr)
            lists = lists_from_jsonl(AUTHORED)
            queries, passages = [item.query for item in lists], [text for item in lists for text in item.passages]
            model = load_pretrained(BASE_CHECKPOINT, AutoModel, num_hidden_layers=BASE_LAYERS, dtype=torch.float32)
            width = model.config.hidden_size
            prompts = {"query": BASE_PROMPT, "passage": BASE_PROMPT}
            tokenizer = load_pretrained(BASE_CHECKPOINT, AutoTokenizer)
            encoder = BiEncoder(model, tokenizer, prompts=prompts, projection=torch.eye(width), normalise=True)
            weights = warmup.sif_weights(tokenizer(passages)["input_ids"], model.config.vocab_size)
            weights[tokenizer(BASE_PROMPT)["input_ids"]] = 0
            encoder.token_weights = weights
            encoder.freeze(BASE_LAYERS)
            bank = StateBank(encoder, cache_dir() / "pooled")
            cuts = warmup.cut_out(passages, BASE_SEED)
            for texts, kind in ((queries, "query"), (cuts, "query"), (passages, "passage")):
                bank.add(texts, kind)
            encoder.centre = bank(queries, "query").pooled.mean(dim=0)
            short, long = (bank(texts, kind).pooled - encoder.centre for texts, kind in ((cuts, "query"), (passages, "passage")))
            encoder.projection = nn.Parameter(warmup.warm_up(warmup.whitening(long), short, long, BASE_SEED))
            encoder.save(scratch)
    return folder
