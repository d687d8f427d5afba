"""A sentence-transformers folder in and out.

Read are the modules Transformer, WordWeights, Pooling, Dense and Normalize.  What else a folder
asks for that could change vectors or scores is refused by name, never dropped.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from repro.support.files import new_folder, one_line, write_json

Config = dict[str, Any]

PACKAGE = "sentence_transformers.models"  # where versions 2 to 6 find their modules
# A module's type names its package; this one has had three places for them.
MODULE = re.compile(
    r"sentence_transformers\.(models|(sentence_transformer|base)\.modules)(\.\w+)?\.(?P<kind>\w+)"
)
# The modules that can be read, in their order, each with the option of `BiEncoder` that it gives.
ORDER = re.compile(
    r"Transformer \(max_length\)(, WordWeights \(token_weights\))?, Pooling \(pooling\)"
    r"(, Dense \(centre\))?(, Dense \(projection\))?(, Normalize \(normalise\))?"
)
# Architectures of checkpoints without modules.json that are plain encoders, or can become one.
PLAIN = re.compile(r"(Model|ForMaskedLM|ForPreTraining|ForCausalLM|Contriever)$")
IDENTITY = "torch.nn.modules.linear.Identity"

# The fields of configurations that are used here, or change nothing.
FREE = {
    "__version__",
    "bias",
    "default_prompt_name",
    "embedding_dimension",
    "in_features",
    "max_seq_length",
    "modality_config",
    "out_features",
    "prompts",
    "requirements",
    "unknown_word_weight",
    "unpad_inputs",
    "vocab",
    "word_embedding_dimension",
    "word_weights",
}
# What other fields may be.  Those that are not here may be nothing: null, false, empty.
FIXED = {
    "activation_function": [IDENTITY, "torch.nn.Identity"],
    "include_prompt": [True],
    "model_type": ["SentenceTransformer"],
    "module_input_name": ["sentence_embedding"],
    "module_output_name": ["sentence_embedding", "token_embeddings"],
    "pooling_mode": ["mean", "cls"],
    "pooling_mode_cls_token": [True, False],
    "pooling_mode_mean_tokens": [True, False],
    "similarity_fn_name": ["cosine", "dot", None],
    "transformer_task": ["feature-extraction"],
}
NOTHING = [None, False, "", [], {}]


def read_json(path: Path) -> Any:
    """The content of a JSON file, {} if there is none."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, but {one_line(error)}") from error


def read_config(path: Path) -> Config:
    """A configuration; ValueError naming the fields whose values this kit does not have."""
    config = read_json(path)
    lacking = []
    for field, value in config.items():
        if field not in FREE and value not in FIXED.get(field, NOTHING):
            lacking.append(f"{field} {one_line(value)}")
    if lacking:
        raise ValueError(f"{path}: this kit does not have {', '.join(lacking)}")
    return config


def read_transformer(folder: Path, config: Config) -> Config:
    """The number of tokens that a text may have."""
    return {"max_length": config.get("max_seq_length")}


def read_word_weights(folder: Path, config: Config) -> Config:
    """A token's own weight, else that of its lower-cased form, else the default."""
    known = config["word_weights"]
    default = config.get("unknown_word_weight", 1.0)
    weights = [known.get(word, known.get(word.lower(), default)) for word in config["vocab"]]
    return {"token_weights": torch.tensor(weights)}


def read_pooling(folder: Path, config: Config) -> Config:
    """One name, or a yes or no for each mode in older folders."""
    is_cls = config.get("pooling_mode_cls_token", False)
    if is_cls and config.get("pooling_mode_mean_tokens"):
        raise ValueError(f"{folder}: expected one pooling mode, found cls and mean")
    return {"pooling": config.get("pooling_mode", "cls" if is_cls else "mean")}


def read_dense(folder: Path, config: Config) -> Config:
    """A centre where the layer only subtracts one, a linear map where it has no bias."""
    if "activation_function" not in config:
        raise ValueError(f"{folder}: has no activation_function, which stands for Tanh")
    weights = load_file(folder / "model.safetensors")
    weight = weights["linear.weight"].float()
    bias = weights.get("linear.bias", torch.zeros(1)).float()
    if not bias.any():
        return {"projection": weight}
    if not torch.equal(weight, torch.eye(len(weight))):
        raise ValueError(f"{folder}: expected a Dense that subtracts a centre or has no bias")
    return {"centre": -bias}


def read_normalize(folder: Path, config: Config) -> Config:
    """Vectors of length 1."""
    return {"normalise": True}


READERS = {
    "Transformer": read_transformer,
    "WordWeights": read_word_weights,
    "Pooling": read_pooling,
    "Dense": read_dense,
    "Normalize": read_normalize,
}


def read_module(folder: Path, row: Config) -> tuple[str, Config]:
    """(kind, the options of `BiEncoder` that it gives) of a module of modules.json."""
    module = MODULE.fullmatch(row["type"])
    if module is None or module["kind"] not in READERS:
        raise ValueError(f"{folder}: its module {one_line(row['type'])} is not in this kit")
    path = (folder / row["path"]).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{folder}: the path {one_line(row['path'])} leads out of it")
    kind = module["kind"]
    file = "sentence_*_config.json" if kind == "Transformer" else "config.json"
    config = {}
    for found in path.glob(file):
        config = read_config(found)
    return kind, READERS[kind](path, config)


def read_modules(folder: Path) -> tuple[Config, str]:
    """What the modules of a modules.json ask for, and the transformer's subfolder."""
    options: Config = {}
    steps = []
    subfolder = ""
    for row in read_json(folder / "modules.json"):
        kind, found = read_module(folder, row)
        steps.append(f"{kind} ({', '.join(found)})")
        options |= found
        if kind == "Transformer":
            subfolder = row["path"]
    chain = ", ".join(steps)
    if not ORDER.fullmatch(chain):
        raise ValueError(f"{folder}: its modules are {chain or 'none'}; expected {ORDER.pattern}")
    if "token_weights" in options and options["pooling"] == "cls":
        raise ValueError(f"{folder}: expected mean pooling after WordWeights, found cls")
    return options, subfolder


def check_plain(folder: Path) -> None:
    """ValueError if a checkpoint without modules.json is no plain encoder."""
    config = read_json(folder / "config.json")
    for kind in config.get("architectures") or []:
        if config.get("is_encoder_decoder") or not PLAIN.search(kind):
            raise ValueError(f"{folder}: is a {one_line(kind)}, expected a text encoder")


def read_prompts(settings: Config) -> dict[str, str]:
    """The prompts for which `encode_query` and `encode_document` of sentence-transformers look.

    A folder that names none of a kind has its default prompt.
    """
    named = settings.get("prompts") or {}
    default = named.get(settings.get("default_prompt_name"), "")
    passage = named.get("passage", named.get("corpus", default))
    return {"query": named.get("query", default), "passage": named.get("document", passage)}


def read_folder(folder: Path, name: str) -> tuple[Config, str]:
    """(options of `BiEncoder`, subfolder of the transformer) that a model's folder asks for.

    A plain transformer, without modules.json, gets no "pooling" option.  Of the ways to compare
    vectors an explicit "cosine" normalises; "dot", or none, leaves them as they are.  Raises
    ValueError for what this kit does not have.
    """
    options: Config = {}
    subfolder = ""
    try:
        settings = read_config(folder / "config_sentence_transformers.json")
        if (folder / "modules.json").is_file():
            options, subfolder = read_modules(folder)
        else:
            check_plain(folder)
        options["prompts"] = read_prompts(settings)
    except (OSError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{name}: expected sentence-transformers' files, but {error!r}") from error
    if settings.get("similarity_fn_name") == "cosine":
        options["normalise"] = True
    return options, subfolder


def write_word_weights(folder: Path, weights: Tensor, tokenizer: Any) -> None:
    """The token weights, as sentence-transformers names them."""
    words = tokenizer.convert_ids_to_tokens(list(range(len(weights))))
    table = dict(zip(words, weights.tolist(), strict=True))
    write_json(folder / "config.json", {"vocab": words, "word_weights": table})


def write_dense(folder: Path, weight: Tensor, bias: Tensor) -> None:
    """The module x -> W x + b."""
    outputs, inputs = weight.shape
    config = {"in_features": inputs, "out_features": outputs, "activation_function": IDENTITY}
    write_json(folder / "config.json", config)
    weights = {"linear.weight": weight.detach().cpu().contiguous(), "linear.bias": bias.cpu()}
    save_file(weights, folder / "model.safetensors")


def write_folder(encoder: Any, folder: Path) -> Path:
    """Write a `BiEncoder`; `SentenceTransformer(folder)` gives the same vectors.  Returns it.

    The prompt of passages is also that of `encode_document`, and of plain `encode`.
    """
    rows: list[Config] = []
    width = encoder.model.config.hidden_size
    pooling = {"word_embedding_dimension": width, "pooling_mode": encoder.pooling}
    settings = {
        "prompts": {**encoder.prompts, "document": encoder.prompts["passage"]},
        "default_prompt_name": "document",
        "similarity_fn_name": "dot",
    }
    with new_folder(folder) as scratch:

        def place(kind: str) -> Path:
            n = len(rows)
            path = f"{n}_{kind}" if n else ""
            rows.append({"idx": n, "name": str(n), "path": path, "type": f"{PACKAGE}.{kind}"})
            return scratch / path

        root = place("Transformer")
        encoder.model.save_pretrained(root)
        encoder.tokenizer.save_pretrained(root)
        write_json(root / "sentence_bert_config.json", {"max_seq_length": encoder.max_length})
        if encoder.token_weights is not None:
            write_word_weights(place("WordWeights"), encoder.token_weights, encoder.tokenizer)
        write_json(place("Pooling") / "config.json", pooling)
        if encoder.centre is not None:
            write_dense(place("Dense"), torch.eye(width), -encoder.centre)
        if encoder.projection is not None:
            bias = torch.zeros(len(encoder.projection))
            write_dense(place("Dense"), encoder.projection, bias)
        if encoder.normalise:
            write_json(place("Normalize") / "config.json", {})
        write_json(root / "modules.json", rows)
        write_json(root / "config_sentence_transformers.json", settings)
    return folder
