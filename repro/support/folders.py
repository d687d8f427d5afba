"""A sentence-transformers folder in and out.

Read are the modules Transformer, WordWeights, Pooling, Dense and Normalize.  What else a folder
asks for that could change vectors or scores is refused by name, never dropped.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from repro.support.files import naming, new_folder, one_line, write_json

# A module's type names its package; this one has had three places for them.
MODULE = (
    r"sentence_transformers\.(models|(sentence_transformer|base)\.modules)(\.\w+)?"
    r"\.(?P<kind>Transformer|WordWeights|Pooling|Dense|Normalize)"
)
# The options of `BiEncoder` that the modules of a readable folder give, in their order.
ORDER = r"max_length( token_weights)? pooling( centre)?( projection)?( normalise)?"
# Architectures of checkpoints without modules.json that are plain encoders, or can become one.
PLAIN = r"(Model|ForMaskedLM|ForPreTraining|ForCausalLM|Contriever)$"
# "field value" of what a configuration may say: fields that are used here, or change nothing; the
# values that others may have; and no value, which all but three may have.
ACCEPTED = r"""(?x)
    (
        __version__
        | bias
        | default_prompt_name
        | embedding_dimension
        | in_features
        | max_seq_length
        | modality_config
        | out_features
        | prompts
        | requirements
        | unknown_word_weight
        | unpad_inputs
        | vocab
        | word_embedding_dimension
        | word_weights
    )\ .*
    | activation_function\ torch\.nn\.(modules\.linear\.)?Identity
    | include_prompt\ True
    | model_type\ SentenceTransformer
    | module_input_name\ sentence_embedding
    | module_output_name\ (sentence_embedding|token_embeddings)
    | pooling_mode\ (cls|mean)
    | pooling_mode_(cls_token|mean_tokens)\ True
    | similarity_fn_name\ (cosine|dot)
    | transformer_task\ feature-extraction
    | (?!activation_function\ |include_prompt\ |pooling_mode\ )\w+\ (None|False|0|\[\]|\{\}|)
"""


def read_json(path: Path) -> Any:
    """The content of a JSON file, {} if there is none."""
    if not path.is_file():
        return {}
    with naming(f"{path}: expected JSON", ValueError):
        return json.loads(path.read_bytes())


def read_config(path: Path) -> dict:
    """A configuration; ValueError naming the fields whose values this kit does not have."""
    config = read_json(path)
    same = read_json(path.with_name("tokenizer_config.json")).items()  # what it does by itself
    given = [
        f"{field} {one_line(value)}"
        for field, value in config.items()
        if (field, value) not in same
    ]
    lacking = [field for field in given if not re.fullmatch(ACCEPTED, field)]
    if lacking:
        raise ValueError(f"{path}: this kit does not have {', '.join(lacking)}")
    return config


def read_word_weights(config: dict) -> Tensor:
    """(V,): a token's own weight, else that of its lower-cased form, else the default."""
    known = config["word_weights"]
    default = config.get("unknown_word_weight", 1.0)
    weights = [known.get(word, known.get(word.lower(), default)) for word in config["vocab"]]
    return torch.tensor(weights)


def read_dense(folder: Path, config: dict) -> tuple:
    """A centre where the layer only subtracts one, a linear map without bias; else ValueError."""
    weights = load_file(folder / "model.safetensors")
    weight = weights["linear.weight"].float()
    bias = weights.get("linear.bias", torch.zeros(1)).float()
    if "activation_function" in config:  # without one it is Tanh
        if not bias.any():
            return "projection", weight
        if torch.equal(weight, torch.eye(len(weight))):
            return "centre", -bias
    raise ValueError(
        f"{folder}: expected a Dense with activation_function that only centres or has no bias"
    )


def read_module(folder: Path, row: dict) -> tuple:
    """The option of `BiEncoder`, (name, value), that a row of modules.json gives, or ValueError."""
    module = re.fullmatch(MODULE, row["type"])
    path = (folder / row["path"]).resolve()
    if not module or not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{folder}: this kit has no module {one_line(row)}")
    kind = module["kind"]
    if kind == "Transformer":
        config = read_config(next(path.glob("sentence_*_config.json"), path))
        return "max_length", config.get("max_seq_length")
    config = read_config(path / "config.json")
    match kind:
        case "WordWeights":
            return "token_weights", read_word_weights(config)
        case "Dense":
            return read_dense(path, config)
        case "Normalize":
            return "normalise", True
    mode = "cls" if config.get("pooling_mode_cls_token") else "mean"  # so older folders say it
    if mode == "cls" and config.get("pooling_mode_mean_tokens"):
        raise ValueError(f"{path}: expected one pooling mode, found cls and mean")
    return "pooling", config.get("pooling_mode", mode)


def read_prompts(settings: dict) -> dict:
    """{"query", "passage"}: the prompts of a folder, "" where it has none.

    That of passages is named "document", else "passage", else "corpus".
    """
    named = settings.get("prompts") or {}
    passage = named.get("passage", named.get("corpus"))
    return {"query": named.get("query") or "", "passage": named.get("document", passage) or ""}


def read_folder(folder: Path) -> tuple:
    """(options of `BiEncoder`, the transformer's folder) that a model's folder asks for.

    A plain transformer, without modules.json, gets no "pooling" option.  Of the ways to compare
    vectors an explicit "cosine" normalises; "dot", or none, leaves them as they are.  Raises
    ValueError for what this kit does not have.
    """
    root = folder
    with naming(f"{folder}: is no text encoder of this kit"):
        settings = read_config(folder / "config_sentence_transformers.json")
        rows = read_json(folder / "modules.json")
        given = [read_module(folder, row) for row in rows]
        options = dict(given)
        if rows:
            root = folder / rows[0]["path"]
            steps = " ".join(name for name, _ in given)
            weighted_cls = "token_weights" in options and options["pooling"] == "cls"
            if weighted_cls or not re.fullmatch(ORDER, steps):
                raise ValueError(f"its modules give {steps}, expected {ORDER}")
        config = read_json(root / "config.json")
        if "AutoModel" in config.get("auto_map", {}):
            raise ValueError(f"{root / 'config.json'}: this kit does not have auto_map's own code")
        if not rows:
            for kind in config.get("architectures") or []:
                if config.get("is_encoder_decoder") or not re.search(PLAIN, kind):
                    raise ValueError(f"{folder}: is a {one_line(kind)}, expected a text encoder")
        options["prompts"] = read_prompts(settings)
    if settings.get("similarity_fn_name") == "cosine":
        options["normalise"] = True
    return options, root


def dense(weight: Tensor, bias: Tensor) -> tuple:
    """The module x -> W x + b."""
    outputs, inputs = weight.shape
    config = {
        "in_features": inputs,
        "out_features": outputs,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    return "Dense", config, {"linear.weight": weight, "linear.bias": bias}


def modules(encoder: Any) -> Iterator:
    """(kind, configuration, weights) of each module."""
    width = encoder.model.config.hidden_size
    yield "Transformer", {"max_seq_length": encoder.max_length}, {}
    if encoder.token_weights is not None:
        weights = encoder.token_weights.tolist()
        words = encoder.tokenizer.convert_ids_to_tokens(range(len(weights)))
        table = dict(zip(words, weights, strict=True))
        yield "WordWeights", {"vocab": words, "word_weights": table}, {}
    yield "Pooling", {"word_embedding_dimension": width, "pooling_mode": encoder.pooling}, {}
    if encoder.centre is not None:
        yield dense(torch.eye(width), -encoder.centre)
    if encoder.frozen:
        yield dense(encoder.projection, torch.zeros(len(encoder.projection)))
    if encoder.normalise:
        yield "Normalize", {}, {}


def write_folder(encoder: Any, folder: Path) -> Path:
    """Write a `BiEncoder`; `SentenceTransformer(folder)` gives the same vectors.  Returns it.

    The prompt of passages is also that of `encode_document`, and of plain `encode`.
    """
    settings = {
        "prompts": {**encoder.prompts, "document": encoder.prompts["passage"]},
        "default_prompt_name": "document",
        "similarity_fn_name": "dot",
    }
    rows = []
    with new_folder(folder) as root:
        encoder.model.save_pretrained(root)
        encoder.tokenizer.save_pretrained(root)
        write_json(root / "config_sentence_transformers.json", settings)
        for n, (kind, config, weights) in enumerate(modules(encoder)):
            path = f"{n}_{kind}"
            file = f"{path}/config.json"
            if kind == "Transformer":
                path = ""  # it lies in the folder itself, which has its own config.json
                file = "sentence_bert_config.json"
            write_json(root / file, config)
            if weights:
                save_file(weights, root / path / "model.safetensors")
            module = f"sentence_transformers.models.{kind}"  # where versions 2 to 6 find it
            rows.append({"idx": n, "name": str(n), "path": path, "type": module})
        write_json(root / "modules.json", rows)
    return folder
