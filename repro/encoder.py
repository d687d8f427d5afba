"""The bi-encoder: one transformer, a (weighted) mean over its token states, one vector a text.

Query and passage go through the same network; the score of a pair is the dot product of their vectors.  Four
options matter for an encoder that was never trained for retrieval; Contriever and its kind need none of them.
A model is saved as a sentence-transformers folder: `SentenceTransformer(folder)` gives the same vectors.
"""

import hashlib
import io
import json
import os
import sys
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from repro import checkpoints, start
from repro.checkpoints import load_pretrained
from repro.files import new_folder, one_line

ROWS_ON_CPU = 16  # texts embedded together in training; 64, padded to the longest, hold 1.4 x the tokens
BLOCK = 1024  # texts in one file of kept vectors: half a minute of work on two cores
WORTH_A_FILE = 64  # texts; fewer are sooner computed again
POOLING_VERSION = 1  # raise it when the code between ids and mean vectors changes, so that old files expire
Texts = Sequence[str]
_KEPT: dict[str, dict[str, Tensor]] = {}  # {fingerprint of a frozen transformer: {prompt + text: (d,)}}

class BiEncoder(nn.Module):
    """Transformer -> weighted mean over tokens -> minus centre -> linear map -> length 1; two always.

        e(x) = W (sum_t w[x_t] h_t / sum_t w[x_t] - c),   then e / |e| if `normalise`

    with h_t the last layer's states; `token_weights` w (V,), which make rare tokens count more, `centre` c
    (d,), and `projection` W (m, d), the linear map, the only one of them that is trained, are options.
    `prompts` {"query", "passage"} are put in front of the texts (E5's "query: ")."""

    def __init__(self, model: nn.Module, tokenizer: Any, *, pooling: str = "mean", normalise: bool = False,
                 token_weights: Tensor | None = None, centre: Tensor | None = None, max_length: int = 256,
                 projection: Tensor | None = None, prompts: dict[str, str] | None = None) -> None:
        super().__init__()
        model.config.use_cache = False  # a causal model would keep keys and values that nobody reads
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # BERT's pooler is not part of e(x); DDP rejects parameters without gradient
        self.model, self.tokenizer = model, tokenizer
        self.pooling, self.normalise, self.max_length = pooling, normalise, max_length
        self.prompts = {"query": "", "passage": "", **(prompts or {})}
        self.fingerprint = ""  # of a transformer that is frozen whole
        self.register_buffer("token_weights", token_weights)
        self.register_buffer("centre", centre)
        self.projection = None if projection is None else nn.Parameter(projection.clone())

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def frozen_whole(self) -> bool:
        """Whether no weight of the transformer trains, so that a text's mean vector never changes."""
        return bool(self.fingerprint)

    def prompted(self, texts: Texts, kind: str) -> list[str]:
        """The prompt of `kind` (query or passage) in front of each text.  ValueError for another kind."""
        if kind not in self.prompts:
            raise ValueError(f"kind: expected one of {', '.join(sorted(self.prompts))}, got {kind!r}")
        if isinstance(texts, str):
            raise ValueError("expected a list of texts, got one str")
        return [self.prompts[kind] + text for text in texts]

    def tokenise(self, texts: Texts, kind: str = "passage") -> list[list[int]]:
        """Token ids of texts with their prompt, cut at `max_length`, at least one id a text."""
        texts = self.prompted(texts, kind)
        options = {"truncation": True, "max_length": self.max_length}
        rows = self.tokenizer(texts, **options)["input_ids"] if texts else []
        return [row or [self.tokenizer.pad_token_id or 0] for row in rows]

    def forward(self, queries: Texts, passages: Texts, chunk: int | None = None) -> tuple[Tensor, Tensor]:
        """(n, d) and (m, d) embeddings with gradient, in one call, as DDP wants one call a step.

        With `chunk`, so many texts are embedded at a time and only their embeddings are kept; the
        backward pass computes the rest again (gradient caching, Gao et al. 2021, arXiv 2101.06983)."""
        return self.embed(queries, "query", chunk), self.embed(passages, "passage", chunk)

    def embed(self, texts: Texts, kind: str, chunk: int | None = None) -> Tensor:
        """(n, d) embeddings with gradient, neighbours in length computed together."""
        if self.frozen_whole:
            return self._finish(self.mean_vectors(texts, kind).to(self.device))
        ids = self.tokenise(texts, kind)
        rows = chunk or (ROWS_ON_CPU if self.device.type == "cpu" else len(ids))
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        run = partial(checkpoint, self._mean, use_reentrant=False) if chunk else self._mean
        parts = [run([ids[row] for row in order[i : i + rows]]) for i in range(0, len(order), rows)]
        return self._finish(torch.cat(parts)[torch.tensor(order).argsort().to(self.device)])

    def _mean(self, ids: list[list[int]]) -> Tensor:
        """(n, hidden) weighted means of the last layer's states, float32."""
        lengths, pad = torch.tensor([len(row) for row in ids]), self.tokenizer.pad_token_id or 0
        rows = [torch.tensor(row) for row in ids]
        padded = nn.utils.rnn.pad_sequence(rows, True, pad).to(self.device)  # (n, L), padded on the right
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long().to(self.device)
        hidden = self.model(input_ids=padded, attention_mask=mask).last_hidden_state  # (n, L, hidden)
        with torch.autocast(self.device.type, enabled=False):  # the mean over tokens stays in float32
            hidden, weights = hidden.float(), mask.float()
            if self.pooling == "cls":
                return hidden[:, 0]
            if self.token_weights is not None:
                weights = weights * self.token_weights[padded]
            total = weights.sum(dim=1, keepdim=True).clamp(min=1e-9)  # sentence-transformers' guard
            return (weights.unsqueeze(1) @ hidden).squeeze(1) / total

    def _finish(self, vectors: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            if self.centre is not None:
                vectors = vectors - self.centre
            if self.projection is not None:
                vectors = vectors @ self.projection.T  # (n, m)
            return nn.functional.normalize(vectors, dim=1) if self.normalise else vectors

    @torch.no_grad()
    def encode(self, texts: Texts, kind: str = "passage", batch_size: int = 32, progress: bool = False
               ) -> Tensor:
        """Embeddings (n, d) of texts, float32, on the CPU, in the order given; `kind`: query or passage."""
        means = self.mean_vectors if self.frozen_whole else self._means
        return self._finish(means(texts, kind, batch_size, progress).to(self.device)).cpu()

    @torch.no_grad()
    def _means(self, texts: Texts, kind: str, batch_size: int, progress: bool) -> Tensor:
        """(n, hidden) on the CPU; longest first, so that a batch that is too large fails at once."""
        ids = self.tokenise(texts, kind)
        order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
        vectors = torch.empty(len(ids), self.model.config.hidden_size)
        was_training = self.training
        self.eval()
        with tqdm(total=len(ids), desc=f"encode, {kind}", unit="text", disable=not progress) as bar:
            for first in range(0, len(order), batch_size):
                rows = order[first : first + batch_size]
                vectors[rows] = self._mean([ids[row] for row in rows]).cpu()
                bar.update(len(rows))
        self.train(was_training)
        return vectors

    def mean_vectors(self, texts: Texts, kind: str, batch_size: int = 32, progress: bool = False) -> Tensor:
        """(n, hidden) mean vectors of a transformer that is frozen whole: computed once, then looked up.

        They stay in memory, and blocks of texts on disk, so that the next process reads them too."""
        if not texts:
            return torch.empty(0, self.model.config.hidden_size)
        kept, keys = _KEPT.setdefault(self.fingerprint, {}), self.prompted(texts, kind)
        by_key = dict(zip(keys, texts, strict=True))
        unique = list(by_key)  # blocks are cut from the texts as given: the same texts give the same files
        blocks = [unique[first : first + BLOCK] for first in range(0, len(unique), BLOCK)]
        new = [block for block in blocks if any(key not in kept for key in block)]
        for block in tqdm(new, f"frozen layers, {kind}", unit="block", disable=not progress or len(new) < 2):
            vectors = self._block([by_key[key] for key in block], kind, batch_size)
            kept.update(zip(block, vectors, strict=True))
        return torch.stack([kept[key] for key in keys])

    def _block(self, texts: list[str], kind: str, batch_size: int) -> Tensor:
        """(n, hidden) mean vectors of one block, from its file if there is a sound one."""
        name = hashlib.sha256(json.dumps([self.fingerprint, self.prompted(texts, kind)]).encode()).hexdigest()
        path = checkpoints.cache_dir() / "vectors" / f"{name[:32]}.npy"
        if path.exists():
            try:
                data = path.read_bytes()  # the array, and a CRC-32 behind it, which numpy does not read
                if zlib.crc32(data[:-4]).to_bytes(4, "big") != data[-4:]:
                    raise ValueError("the checksum differs")
                return torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False))
            except (OSError, ValueError, EOFError) as error:
                print(f"{path}: damaged ({one_line(error)}), its vectors are computed again", file=sys.stderr)
        vectors = self._means(texts, kind, batch_size, progress=False)
        if len(texts) >= WORTH_A_FILE and checkpoints.writable(path.parent):
            array = io.BytesIO()
            np.save(array, vectors.numpy(), allow_pickle=False)
            scratch = path.with_suffix(f".{os.getpid()}.tmp")
            scratch.write_bytes(array.getvalue() + zlib.crc32(array.getvalue()).to_bytes(4, "big"))
            os.replace(scratch, path)
        return vectors

    def freeze(self, layers: int | None) -> None:
        """Keep the embeddings and the lowest `layers` layers as they are; None lets everything train.

        All layers can be frozen where there is a linear map to train; each text then goes through the
        transformer once.  Raises ValueError if nothing would be left to train."""
        depth = self.model.config.num_hidden_layers
        lists = (module for module in self.model.modules() if isinstance(module, nn.ModuleList))
        stack = next((layers for layers in lists if len(layers) == depth), None)
        most = depth if self.projection is not None else depth - 1
        if layers is not None and (stack is None and layers < depth or not 0 <= layers <= most):
            raise ValueError(f"freeze: expected 0 to {most} layers for this model, got {layers}")
        parameters = list(self.model.parameters())  # in order: embeddings, layers, a final norm
        border = 0 if layers is None else len(parameters)
        if layers is not None and layers < depth:
            first = next(stack[layers].parameters())
            border = next(n for n, parameter in enumerate(parameters) if parameter is first)
        for n, parameter in enumerate(parameters):
            parameter.requires_grad_(n >= border)
        self.fingerprint = self._fingerprint() if layers == depth else ""

    def _fingerprint(self) -> str:
        """Hex sha256 of all that mean vectors depend on."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        tokenizer = json.loads(backend.to_str()) if backend is not None else self.tokenizer.get_vocab()
        config = {**self.model.config.to_dict(), "_name_or_path": ""}  # wherever the model lies
        tokenizer |= {"truncation": None, "padding": None}  # states of an earlier call
        code = [POOLING_VERSION, transformers.__version__, type(self.model).__name__, self.device.type]
        parts = [*code, self.pooling, self.max_length, config, tokenizer]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
        weights = {**self.model.state_dict(), "token_weights": self.token_weights}
        for key in sorted(key for key, value in weights.items() if value is not None):
            digest.update(f"{key} {weights[key].dtype} {tuple(weights[key].shape)}".encode())
            digest.update(weights[key].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> Path:
        """Write a sentence-transformers folder (safetensors); it must not exist or be empty.  Returns it.

        Modules: Transformer, WordWeights, Pooling, Dense (identity with bias -c), Dense (W), Normalize; those
        that the model does not use are left out."""
        with new_folder(folder) as scratch:
            self.model.save_pretrained(scratch)
            self.tokenizer.save_pretrained(scratch)
            width, names = self.model.config.hidden_size, [("", "Transformer")]

            def write(path: str, content: Any) -> None:
                text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
                (scratch / path).write_text(text, encoding="utf-8")

            def add(kind: str, config: dict[str, Any] | None, **weights: Tensor) -> None:
                path = f"{len(names)}_{kind}"
                names.append((path, kind))
                (scratch / path).mkdir()
                if config is not None:
                    write(f"{path}/config.json", config)
                if weights:
                    plain = {f"linear.{k}": v.detach().float().cpu().contiguous() for k, v in weights.items()}
                    save_file(plain, scratch / path / "model.safetensors")

            if self.token_weights is not None:
                words = self.tokenizer.convert_ids_to_tokens(list(range(len(self.token_weights))))
                words = [word or "" for word in words]
                by_word = dict(zip(words, self.token_weights.tolist(), strict=True))
                add("WordWeights", {"vocab": words, "word_weights": by_word, "unknown_word_weight": 1})
            modes = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
            pooling = {key: mode == self.pooling for key, mode in modes.items()}
            add("Pooling", {"word_embedding_dimension": width, **pooling})
            dense = {"in_features": width, "activation_function": "torch.nn.modules.linear.Identity"}
            if self.centre is not None:
                shift = {"weight": torch.eye(width), "bias": -self.centre}
                add("Dense", {**dense, "out_features": width, "bias": True}, **shift)
            if (w := self.projection) is not None:
                add("Dense", {**dense, "out_features": len(w), "bias": False}, weight=w)
            if self.normalise:
                add("Normalize", None)
            kinds = [(path, f"sentence_transformers.models.{kind}") for path, kind in names]
            rows = [{"idx": n, "name": str(n), "path": p, "type": kind} for n, (p, kind) in enumerate(kinds)]
            write("modules.json", rows)
            write("sentence_bert_config.json", {"max_seq_length": self.max_length, "do_lower_case": False})
            default = "passage" if any(self.prompts.values()) else None
            named = {"prompts": self.prompts, "default_prompt_name": default, "similarity_fn_name": "dot"}
            write("config_sentence_transformers.json", named)
        return Path(folder)

    @classmethod
    def load(cls, path_or_name: str | Path, device: str = "auto", dtype: str = "float32") -> "BiEncoder":
        """A saved folder, a sentence-transformers or plain checkpoint, a built-in name, "base", a hub id.

        A plain transformer gets mean pooling and raw dot products, as Contriever has them.  Raises ValueError
        if it cannot be loaded or needs a module that this kit does not have."""
        target = checkpoints.pick_device(device)
        number_format = checkpoints.pick_dtype(dtype, target, encoding=True)
        where = start.base_folder(cls) if os.fspath(path_or_name) == "base" else path_or_name
        options, subfolder = checkpoints.read_modules(where)
        inside = {"subfolder": subfolder} if subfolder else {}
        model = load_pretrained(where, AutoModel, dtype=number_format, **inside)
        tokenizer = load_pretrained(where, AutoTokenizer, **inside)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        limit = getattr(model.config, "max_position_embeddings", None) or 256
        longest = tokenizer.model_max_length if options else 256  # newer folders keep their limit there
        return cls(model, tokenizer, **{"max_length": min(longest, limit), **options}).to(target).eval()
