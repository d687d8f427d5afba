"""A bi-encoder on disk: the sentence-transformers folder format, read and written without that library.

    config.json, model.safetensors, tokenizer.json ...      the transformer
    modules.json                                            which modules follow it, in order
    1_WordWeights/  2_Pooling/  3_Dense/  4_Dense/ ...      one small config (and weights) each

Only the modules that `repro.encoder` has are understood; a folder with another one is refused.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from repro.checkpoints import CheckpointError, find_file, quiet_transformers

PREFIX = "sentence_transformers.models."  # the long-lived import path, which old and new releases read


def save_folder(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    pooling: str,
    token_weights: Tensor | None,
    centre: Tensor | None,
    projection: Tensor | None,
    normalise: bool,
    max_length: int,
    prompts: dict[str, str],
) -> Path:
    """Write everything into a scratch folder beside `folder` and rename it at the end.

    Raises CheckpointError if `folder` exists and is not empty: nothing is overwritten.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists already and is not empty; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with quiet_transformers():
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        width, modules = model.config.hidden_size, [("", "Transformer")]
        _write(scratch / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})

        def add(kind: str, config: dict[str, Any] | None, weights: dict[str, Tensor] | None = None) -> None:
            path = scratch / f"{len(modules)}_{kind}"
            modules.append((path.name, kind))
            path.mkdir()
            if config is not None:
                _write(path / "config.json", config)
            if weights:
                save_file({key: value.detach().cpu().contiguous() for key, value in weights.items()}, path / "model.safetensors")

        if token_weights is not None:
            vocabulary = [token or "" for token in tokenizer.convert_ids_to_tokens(range(len(token_weights)))]
            by_word = dict(zip(vocabulary, token_weights.tolist(), strict=True))
            add("WordWeights", {"vocab": vocabulary, "word_weights": by_word, "unknown_word_weight": 1})
        modes = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}
        add("Pooling", {"word_embedding_dimension": width} | {key: mode == pooling for mode, key in modes.items()})
        dense = {"in_features": width, "activation_function": "torch.nn.modules.linear.Identity"}
        if centre is not None:
            shift = {"linear.weight": torch.eye(width), "linear.bias": -centre.float()}
            add("Dense", dense | {"out_features": width, "bias": True}, shift)
        if projection is not None:
            add("Dense", dense | {"out_features": len(projection), "bias": False}, {"linear.weight": projection.float()})
        if normalise:
            add("Normalize", None)
        rows = [{"idx": n, "name": str(n), "path": p, "type": PREFIX + kind} for n, (p, kind) in enumerate(modules)]
        _write(scratch / "modules.json", rows)
        named = {"prompts": prompts, "default_prompt_name": "passage" if any(prompts.values()) else None}
        _write(scratch / "config_sentence_transformers.json", {**named, "similarity_fn_name": "dot"})
        scratch.chmod(0o755)  # mkdtemp makes it private
        if folder.exists():
            folder.rmdir()  # empty, as checked above
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def read_modules(name: str | Path) -> tuple[dict[str, Any], str]:
    """(constructor options of BiEncoder, subfolder of the transformer) that a checkpoint's modules.json asks for.

    A checkpoint without modules.json is a plain transformer: no options, no subfolder.  Raises
    CheckpointError for a module, pooling or Dense layer that the kit does not have.
    """
    listing = find_file(name, "modules.json")
    if listing is None:
        return {}, ""
    options: dict[str, Any] = {"normalise": False}
    subfolder = ""
    for module in json.loads(listing.read_text(encoding="utf-8")):
        kind, path = module["type"].rpartition(".")[2], module["path"]
        if kind == "Transformer":
            subfolder = path
            settings = _read(name, f"{path}/sentence_bert_config.json".lstrip("/"))
            if settings.get("max_seq_length"):
                options["max_length"] = settings["max_seq_length"]
        elif kind == "WordWeights":
            options["token_weights"] = _token_weights(_read(name, f"{path}/config.json"))
        elif kind == "Pooling":
            options["pooling"] = _pooling(_read(name, f"{path}/config.json"), f"{name}/{path}")
        elif kind == "Dense":
            key, value = _dense(_weights(name, path), _read(name, f"{path}/config.json"), f"{name}/{path}")
            if key in options or "projection" in options or options["normalise"]:
                raise CheckpointError(f"{name}/{path}: expected Dense layers in the order centre, projection, then Normalize")
            options[key] = value
        elif kind == "Normalize":
            options["normalise"] = True
        else:
            raise CheckpointError(f"{name}: modules.json asks for {kind}, which this kit does not have")
    prompts = _read(name, "config_sentence_transformers.json").get("prompts") or {}
    known = {"query": "query", "passage": "passage", "document": "passage", "corpus": "passage"}
    options["prompts"] = {known[key]: text for key, text in prompts.items() if key in known and text}
    return options, subfolder


def _token_weights(config: dict[str, Any]) -> Tensor:
    """(V,) weights by sentence-transformers' rule: the token's own, else its lower-cased form's, else the default."""
    known, default = config["word_weights"], config.get("unknown_word_weight", 1)
    return torch.tensor([float(known.get(word, known.get(word.lower(), default))) for word in config["vocab"]])


def _pooling(config: dict[str, Any], where: str) -> str:
    asked = {key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on}
    if isinstance(config.get("pooling_mode"), str):  # the newer spelling: one string
        asked = {config["pooling_mode"]}
    names = {"mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls"}
    if len(asked) != 1 or not asked <= names.keys():
        raise CheckpointError(f"{where}: expected mean or cls pooling, found {', '.join(sorted(asked)) or 'none'}")
    return names[asked.pop()]


def _dense(weights: dict[str, Tensor], config: dict[str, Any], where: str) -> tuple[str, Tensor]:
    """What a Dense layer is to this kit: ("centre", c) where it only subtracts c, ("projection", W) where it has no bias."""
    weight, bias = weights["linear.weight"], weights.get("linear.bias")
    is_linear = str(config.get("activation_function", "")).endswith("Identity") and not config.get("use_residual")
    if is_linear and (bias is None or not bias.any()):
        return "projection", weight
    if is_linear and weight.shape[0] == weight.shape[1] and torch.equal(weight, torch.eye(len(weight))):
        return "centre", -bias
    raise CheckpointError(f"{where}: expected a Dense layer that subtracts a centre or is a linear map without bias")


def _weights(name: str | Path, path: str) -> dict[str, Tensor]:
    file = find_file(name, f"{path}/model.safetensors")
    if file is None:
        raise CheckpointError(f"{name}: expected {path}/model.safetensors, found none (pickled weights are not read)")
    return load_file(file)


def _read(name: str | Path, path: str) -> dict[str, Any]:
    file = find_file(name, path)
    return json.loads(file.read_text(encoding="utf-8")) if file else {}


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
