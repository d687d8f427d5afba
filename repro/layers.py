"""Part of a transformer's layers: freeze the lower ones, run only some of them.

Working on the list of layers and with hooks, rather than on one model's own forward, is what lets the
same few lines serve Llama-, BERT- and other-shaped transformers.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def layer_list(model: nn.Module) -> tuple[nn.Module, str]:
    """Where a transformer keeps its layers: the module, and the attribute name of the ModuleList in it."""
    depth = model.config.num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            parent, _, name = path.rpartition(".")
            return model.get_submodule(parent), name
    raise ValueError(f"{type(model).__name__}: found no list of {depth} layers, so none can be frozen")


def freeze_layers(model: nn.Module, layers: int, all_of_them: bool = False) -> None:
    """Freeze the embeddings and the lowest `layers` layers; 0 leaves the whole model trainable.

    Raises ValueError for a negative number, for more layers than there are, and for all of them
    (which freezes the final norm too) unless `all_of_them` says that something else is left to train.
    """
    parent, name = layer_list(model)
    stack = getattr(parent, name)
    most = len(stack) if all_of_them else len(stack) - 1
    if not 0 <= layers <= most:
        hint = "; all of them only where a projection is left to train" if layers == len(stack) else ""
        raise ValueError(f"frozen layers: expected 0 to {most}, got {layers}{hint}")
    parameters = list(model.parameters())  # in order: embeddings, layers, a final norm
    last_frozen = list(stack[layers - 1].parameters())[-1] if layers else None
    border = next((n for n, p in enumerate(parameters, start=1) if p is last_frozen), 0)
    for number, parameter in enumerate(parameters):
        parameter.requires_grad_(number >= border and layers < len(stack))


@contextlib.contextmanager
def only_layers(model: nn.Module, first: int, last: int | None, entering: Tensor | None = None) -> Iterator[list[Tensor]]:
    """Run only layers first:last in this block, fed with `entering`; the list collects what leaves them."""
    parent, name = layer_list(model)
    stack = getattr(parent, name)
    part, leaving = stack[first:last], []

    def enter(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return ((entering, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": entering})

    def leave(_: nn.Module, __: tuple, output: Any) -> None:
        leaving.append(output[0] if isinstance(output, tuple) else output)

    hooks = [part[-1].register_forward_hook(leave)]
    if entering is not None:
        hooks.append(part[0].register_forward_pre_hook(enter, with_kwargs=True))
    setattr(parent, name, part)
    try:
        yield leaving
    finally:
        setattr(parent, name, stack)
        for hook in hooks:
            hook.remove()
