"""Watching a forward pass through hooks, and what it tells of a model without knowing its family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from padst_cli.errors import PadstError

Inputs = Mapping[str, Tensor]
_TOKENS = 8


class Stop(Exception):
    """Raised by a hook to end a forward pass that has given all it was run for."""


def run_model(model: nn.Module, inputs: Inputs) -> Any:
    """One forward pass of the whole model without labels and, where the model knows the word, without a cache."""
    arguments: dict[str, Any] = {key: value for key, value in inputs.items() if key != "labels"}
    if "use_cache" in signature(model.forward).parameters:
        arguments["use_cache"] = False
    return model(**arguments)


def pre_hook(module: nn.Module, call: Callable[..., Any]) -> Callable[[], Any]:
    """An installer, for `run_hooked`, of a forward pre-hook `call(module, args, kwargs)`."""
    return lambda: module.register_forward_pre_hook(call, with_kwargs=True)


def post_hook(module: nn.Module, call: Callable[..., Any]) -> Callable[[], Any]:
    """An installer, for `run_hooked`, of a forward hook `call(module, args, output)`."""
    return lambda: module.register_forward_hook(call)


def run_hooked(installers: Sequence[Callable[[], Any]], run: Callable[[], Any]) -> None:
    """Call `run` with hooks installed, until it returns or one of them raises `Stop`; the hooks are removed after."""
    with ExitStack() as stack:
        for install in installers:
            stack.callback(install().remove)
        with suppress(Stop):
            run()


class _WithoutValues(TorchDispatchMode):
    """Answers 0 where a model asks for the value of a meta tensor, which has none (is this mask empty?)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.zeros((), dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))


def example_inputs(model: Any) -> Inputs:
    """The smallest batch that a transformers model of text or images takes, on its device (meta included)."""
    device = next(model.parameters()).device
    config = model.config
    if model.main_input_name != "pixel_values":
        return {"input_ids": torch.zeros(1, _TOKENS, dtype=torch.int64, device=device)}
    size = config.image_size
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return {"pixel_values": torch.zeros(1, config.num_channels, *sides, dtype=model.dtype, device=device)}


@torch.no_grad()
def layers_by_input(model: nn.Module, layers: Sequence[str], inputs: Inputs) -> list[list[str]]:
    """The `layers` (dotted names) that read the very same tensor one after the other, in groups of two and more.

    Works on the meta device too, where tensors have no values. A layer that runs more than once is left out. Raises
    `PadstError` where the pass depends on values and there are none.
    """
    groups: list[list[str]] = []
    calls: Counter[str] = Counter()
    last: Tensor | None = None

    def enter(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        nonlocal last
        calls[name] += 1
        read = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if read is not None and read is last:
            groups[-1].append(name)
        else:
            groups.append([name])
        last = read

    hooks = [
        pre_hook(model.get_submodule(layer), lambda _, args, kwargs, name=layer: enter(name, args, kwargs))
        for layer in layers
    ]
    try:
        with _WithoutValues():
            run_hooked(hooks, lambda: run_model(model, inputs))
    except (RuntimeError, ValueError) as error:  # what code that asks for values raises without them
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PadstError(
            f"which layers of this {type(model).__name__} read the same input cannot be told without its weights "
            f"({reason}); leave out --share-permutations"
        ) from error
    return [group for group in groups if len(group) > 1 and all(calls[name] == 1 for name in group)]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside the block; each gets its flag back."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
