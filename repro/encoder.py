"""The bi-encoder: one transformer, a (weighted) mean over its token states, one vector a text.

Query and passage go through the same network; the score of a pair is the dot product of their vectors.
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from repro import checkpoints, start
from repro.checkpoints import find_file, load_pretrained, new_folder, one_line, write_json

ROWS_ON_CPU = 16  # texts embedded together in training; 64, padded to the longest, hold 1.4 x the tokens
BLOCK = 1024  # texts in one file of kept vectors: half a minute of work on two cores
WORTH_A_FILE = 64  # texts; fewer are sooner computed again
POOLING_VERSION = 1  # raise it when the code between ids and mean vectors changes, so that old files expire
Texts = Sequence[str]
_KEPT: dict[str, dict[str, Tensor]] = {}  # {fingerprint of a frozen transformer: {prompt + text: (d,)}}

class BiEncoder(nn.Module):
    """Transformer -> weighted mean over tokens -> minus centre -> linear map -> length 1; two always.

        e(x) = W (sum_t w[x_t] h_t / sum_t w[x_t] - c),   then e / |e| if `normalise`

    with h_t the last layer's states.  Options that Contriever and its kind do not need: `token_weights` w
    (V,), which make rare tokens count more, `centre` c (d,), `projection` W (m, d), the linear map, the only
    one of them that trains, and `prompts` {"query", "passage"} in front of the texts (E5's "query: ")."""

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
        self.frozen_whole, self.fingerprint = False, ""  # whole: a text's mean vector never changes
        self.register_buffer("token_weights", token_weights)
        self.register_buffer("centre", centre)
        self.projection = None if projection is None else nn.Parameter(projection.clone())

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def prompted(self, texts: Texts, kind: str) -> list[str]:
        """The prompt of `kind` (query or passage) in front of each text.  ValueError for another kind."""
        if kind not in self.prompts:
            raise ValueError(f"kind: expected one of {', '.join(sorted(self.prompts))}, got {kind!r}")
        if isinstance(texts, str):
            raise ValueError("expected a list of texts, got one str")
        return [self.prompts[kind] + text for text in texts]

    def tokenise(self, texts: Texts, kind: str = "passage") -> list[list[int]]:
        """Token ids of texts with their prompt, cut at `max_length`, at least one id a text."""
        texts, options = self.prompted(texts, kind), {"truncation": True, "max_length": self.max_length}
        rows = self.tokenizer(texts, **options)["input_ids"] if texts else []
        return [row or [self.tokenizer.pad_token_id or 0] for row in rows]

    def forward(self, queries: Texts, passages: Texts, chunk: int | None = None) -> tuple[Tensor, Tensor]:
        """(n, d) and (m, d) embeddings with gradient, in one call, as DDP wants one a step.  With `chunk`, so
        many texts are embedded at a time and only their embeddings are kept; the backward pass computes the
        rest again (gradient caching, Gao et al. 2021, arXiv 2101.06983)."""
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
        padded = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], True, pad)  # on the right
        padded = padded.to(self.device)  # (n, L)
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
            vectors = vectors if self.centre is None else vectors - self.centre
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
        if batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
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
        trains, first = layers is None, None if layers in (None, depth) else next(stack[layers].parameters())
        for parameter in self.model.parameters():  # in order: embeddings, layers, a final norm
            trains = trains or parameter is first
            parameter.requires_grad_(trains)
        self.frozen_whole = layers == depth
        self.fingerprint = self._fingerprint() if self.frozen_whole else ""

    def _fingerprint(self) -> str:
        """Hex sha256 of all that mean vectors depend on."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        tokenizer = json.loads(backend.to_str()) if backend is not None else self.tokenizer.get_vocab()
        config = {**self.model.config.to_dict(), "_name_or_path": ""}  # wherever the model lies
        tokenizer |= {"truncation": None, "padding": None}  # states of an earlier call
        parts = [POOLING_VERSION, transformers.__version__, type(self.model).__name__, self.device.type,
                 self.pooling, self.max_length, config, tokenizer]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
        weights = {**self.model.state_dict(), "token_weights": self.token_weights}
        for key in sorted(key for key, value in weights.items() if value is not None):
            digest.update(f"{key} {weights[key].dtype} {tuple(weights[key].shape)}".encode())
            digest.update(weights[key].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> Path:
        """Write a sentence-transformers folder (safetensors); it must not exist or be empty.  Returns it."""
        width, rows = self.model.config.hidden_size, []
        dense = {"in_features": width, "activation_function": "torch.nn.modules.linear.Identity"}
        modules: list[tuple[str, dict[str, Any], dict[str, Tensor]]] = [("Transformer", {}, {})]
        if self.token_weights is not None:
            weights = self.token_weights.tolist()
            words = [word or "" for word in self.tokenizer.convert_ids_to_tokens([*range(len(weights))])]
            config = {"vocab": words, "word_weights": dict(zip(words, weights, strict=True))}
            modules.append(("WordWeights", {**config, "unknown_word_weight": 1}, {}))
        pooling = {"word_embedding_dimension": width, "pooling_mode_cls_token": self.pooling == "cls"}
        modules.append(("Pooling", {**pooling, "pooling_mode_mean_tokens": self.pooling == "mean"}, {}))
        if self.centre is not None:
            shift = {"linear.weight": torch.eye(width), "linear.bias": -self.centre}
            modules.append(("Dense", {**dense, "out_features": width, "bias": True}, shift))
        if (w := self.projection) is not None:
            modules.append(("Dense", {**dense, "out_features": len(w), "bias": False}, {"linear.weight": w}))
        modules += [("Normalize", {}, {})] * self.normalise
        default = "passage" if any(self.prompts.values()) else None
        named = {"prompts": self.prompts, "default_prompt_name": default, "similarity_fn_name": "dot"}
        with new_folder(folder) as scratch:
            self.model.save_pretrained(scratch)
            self.tokenizer.save_pretrained(scratch)
            for n, (kind, config, weights) in enumerate(modules):
                path, kind = f"{n}_{kind}" if n else "", f"sentence_transformers.models.{kind}"
                rows.append({"idx": n, "name": str(n), "path": path, "type": kind})
                (scratch / path).mkdir(exist_ok=True)
                if config:
                    write_json(scratch / path / "config.json", config)
                if weights:
                    plain = {key: value.detach().float().cpu().contiguous() for key, value in weights.items()}
                    save_file(plain, scratch / path / "model.safetensors")
            write_json(scratch / "modules.json", rows)
            write_json(scratch / "sentence_bert_config.json", {"max_seq_length": self.max_length})
            write_json(scratch / "config_sentence_transformers.json", named)
        return Path(folder)

    @classmethod
    def load(cls, path_or_name: str | Path, device: str = "auto", dtype: str = "float32") -> "BiEncoder":
        """A saved folder, a sentence-transformers or plain checkpoint, a built-in name, "base", a hub id.

        A plain transformer gets mean pooling and raw dot products, as Contriever has them.  Raises ValueError
        if it cannot be loaded or needs a module that this kit does not have."""
        target = checkpoints.pick_device(device)
        number_format = checkpoints.pick_dtype(dtype, target, encoding=True)
        where = start.base_folder(cls) if os.fspath(path_or_name) == "base" else path_or_name
        options, subfolder = read_modules(where)
        model = load_pretrained(where, AutoModel, dtype=number_format, subfolder=subfolder)
        tokenizer = load_pretrained(where, AutoTokenizer, subfolder=subfolder)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        limit = getattr(model.config, "max_position_embeddings", None) or 256
        longest = tokenizer.model_max_length if options else 256  # newer folders keep their limit there
        made = cls(model, tokenizer, **{"max_length": min(longest, limit), **options}).to(target).eval()
        if made.projection is not None and os.fspath(path_or_name) == "base":
            made.freeze(model.config.num_hidden_layers)
        return made

    @property
    def frozen(self) -> bool:
        return self.frozen_whole

    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

def read_modules(name: str | Path) -> tuple[dict[str, Any], str]:
    """(options of `BiEncoder`, subfolder of the transformer) that a sentence-transformers folder asks for.

    A plain transformer, without modules.json, gives ({}, "").  ValueError for what the kit does not have."""

    def read(*path: str) -> Any:
        file = find_file(name, Path(*path).as_posix())
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file else {}
        except ValueError as error:
            raise ValueError(f"{name}: {'/'.join(path)}: expected JSON, but {one_line(error)}") from error

    options, subfolder = {"normalise": False}, ""
    try:
        for kind, path in [(row["type"].rpartition(".")[2], row["path"]) for row in read("modules.json")]:
            config, where = read(path, "config.json"), f"{name}/{path}"
            if kind == "Transformer":
                subfolder = path
                options["max_length"] = (own := read(path, "sentence_bert_config.json")).get("max_seq_length")
                if own.get("do_lower_case"):
                    raise ValueError(f"{name}: asks for do_lower_case, which is not in this kit")
            elif kind == "WordWeights":  # a token's own weight, else its lower-cased form's, else the default
                known, default = config["word_weights"], config.get("unknown_word_weight", 1)
                weights = (known.get(word, known.get(word.lower(), default)) for word in config["vocab"])
                options["token_weights"] = torch.tensor([float(weight) for weight in weights])
            elif kind == "Pooling":
                on = [key[13:].removesuffix("s").removesuffix("_token") for key, value in config.items()
                      if value is True and key.startswith("pooling_mode_")]
                how = options["pooling"] = config.get("pooling_mode") or "+".join(on)  # newer: one string
                if how not in ("mean", "cls") or not config.get("include_prompt", True):
                    raise ValueError(f"{where}: expected mean or cls pooling of all tokens, found {how}")
            elif kind == "Dense":
                key, value = _dense(find_file(name, f"{path}/model.safetensors"), config, where)
                if key in options or "projection" in options or options["normalise"]:
                    raise ValueError(f"{where}: expected Dense layers in the order centre, linear map")
                options[key] = value
            elif kind == "Normalize":
                options["normalise"] = True
            else:
                raise ValueError(f"{name}: modules.json asks for {one_line(kind)}, which is not in this kit")
        given = (own := read("config_sentence_transformers.json")).get("prompts") or {}
        known = {"query": "query", "passage": "passage", "document": "passage", "corpus": "passage"}
        lack = {*known.values()} - {*map(known.get, given)} if (one := own.get("default_prompt_name")) else ()
        options["prompts"] = dict.fromkeys(lack, given[one] if lack else "")
        options["prompts"] |= {known[key]: text for key, text in given.items() if key in known and text}
    except (KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{name}: expected the files of sentence-transformers, but {error!r}") from error
    known = {key: value for key, value in options.items() if value is not None}
    return (known, subfolder) if "max_length" in options else ({}, "")

def _dense(file: Path | None, config: dict[str, Any], where: str) -> tuple[str, Tensor]:
    """("centre", c) where a Dense layer only subtracts c, ("projection", W) where it has no bias."""
    if file is None:
        raise ValueError(f"{where}: expected model.safetensors, found none (pickled weights are not read)")
    weights = {key: value.float() for key, value in load_file(file).items()}
    weight, bias = weights["linear.weight"], weights.get("linear.bias")
    is_linear = config["activation_function"].endswith("Identity") and not config.get("use_residual")
    if is_linear and (bias is None or not bias.any()):
        return "projection", weight
    if is_linear and weight.shape[0] == weight.shape[1] and torch.equal(weight, torch.eye(len(weight))):
        return "centre", -bias
    raise ValueError(f"{where}: expected a Dense layer that subtracts a centre or is a linear map, no bias")


def set_dropout(model: nn.Module, p: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
