"""Where calibration can cut a model: its repeated blocks, their order, and the layers inside that share an input.

Nothing here knows a model family. A block is an item of an `nn.ModuleList` that contains planned layers; one traced
forward pass tells in which order blocks and layers run, which layers read the very same tensor (query, key and value;
gate and up), and whether a block's first input is the previous block's output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from padst_cli.tracing import Inputs, Stop, post_hook, pre_hook, run_hooked, run_model

_WHOLE = "\0"


@dataclass(frozen=True)
class Group:
    """Planned layers that read the very same tensor, and how often they ran in the traced pass."""

    layers: tuple[str, ...]
    calls: int


@dataclass(frozen=True)
class Unit:
    """A stretch of the model that is calibrated by running `module` (a block, or "" for the whole model).

    `groups` are in execution order. `chained`: the input of this block is the output of the unit before.
    """

    module: str
    groups: tuple[Group, ...]
    chained: bool


@dataclass(frozen=True)
class Call:
    """The arguments of one block call without the hidden states, which go back in by `with_stream`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: int | str

    def with_stream(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The full arguments, with `hidden` where the hidden states were."""
        if isinstance(self.key, str):
            return self.args, {**self.kwargs, self.key: hidden}
        return (hidden, *self.args), self.kwargs


def first_tensor(output: Any) -> Tensor | None:
    """The hidden states in a block's output: the tensor itself, or the first entry of a tuple or model output."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    return None


def split_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor | None, Call]:
    """Take the hidden states, the first argument (or the first tensor by keyword), out of a block's arguments."""
    if args:
        stream = args[0] if isinstance(args[0], Tensor) else None
        return stream, Call(args[1:], dict(kwargs), 0)
    key = next((name for name, value in kwargs.items() if isinstance(value, Tensor)), None)
    if key is None:
        return None, Call((), dict(kwargs), 0)
    return kwargs[key], Call((), {name: value for name, value in kwargs.items() if name != key}, key)


def record_calls(
    model: nn.Module, blocks: Sequence[str], inputs: Inputs, noise: float = 0.0
) -> tuple[Tensor, list[Call]]:
    """Run `model` until the last of `blocks`; returns the first one's hidden states and the other arguments of each.

    `blocks` are in execution order. `noise` scales a perturbation of the first block's hidden states, to see what else
    depends on them.
    """
    streams: list[Tensor] = []
    calls: list[Call] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        del module
        stream, call = split_call(args, kwargs)
        calls.append(call)
        first = len(calls) == 1
        if first and stream is not None:
            streams.append(stream)
        if len(calls) == len(blocks):
            raise Stop
        if noise and first and stream is not None:
            return call.with_stream(stream + noise * torch.linspace(-1.0, 1.0, stream.shape[-1]).to(stream))
        return None

    targets = [model.get_submodule(name) for name in blocks]
    run_hooked([pre_hook(module, before) for module in targets], lambda: run_model(model, inputs))
    return streams[0], calls


def find_block(model: nn.Module, layer: str) -> str | None:
    """The outermost `nn.ModuleList` item around `layer` (the layer itself included), or None outside all of them."""
    parts = layer.split(".")
    for end in range(1, len(parts) + 1):
        parent = model.get_submodule(".".join(parts[: end - 1]))
        item = model.get_submodule(".".join(parts[:end]))
        if isinstance(parent, nn.ModuleList) and not isinstance(item, (nn.ModuleList, nn.ModuleDict)):
            return ".".join(parts[:end])
    return None


@dataclass
class _Trace:
    """What one pass shows: order of first calls, how often each module ran, and which layers read the same tensor."""

    order: list[str] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    follows: dict[str, str] = field(default_factory=dict)
    same_input: dict[str, str] = field(default_factory=dict)
    streamless: set[str] = field(default_factory=set)
    last_output: tuple[str, Tensor] | None = None
    last_input: tuple[str, Tensor] | None = None

    def enter_block(self, name: str, args: Any, kwargs: Any) -> None:
        self._count(name)
        stream, _ = split_call(args, kwargs)
        if stream is None:
            self.streamless.add(name)
        # By value and against a copy: a model may change the tensor in place between two blocks.
        if stream is not None and self.last_output is not None and _equal(stream, self.last_output[1]):
            self.follows[name] = self.last_output[0]

    def leave_block(self, name: str, output: Any) -> None:
        hidden = first_tensor(output)
        self.last_output = None if hidden is None else (name, hidden.clone())

    def enter_layer(self, name: str, args: Any, kwargs: Any) -> None:
        self._count(name)
        read, _ = split_call(args, kwargs)
        if self.last_input is not None and self.last_input[1] is read:
            self.same_input[name] = self.last_input[0]
        self.last_input = None if read is None else (name, read)

    def _count(self, name: str) -> None:
        if name not in self.calls:
            self.order.append(name)
        self.calls[name] += 1


def find_units(model: nn.Module, layers: Sequence[str], inputs: Inputs) -> tuple[Unit, ...]:
    """Cut `model` into units that contain `layers` (dotted names), from traced passes over the batch `inputs`.

    A block that runs more than once in a pass (shared weights), takes no tensor, or is never called as a module is
    calibrated through passes of the whole model instead, as are layers outside all blocks. Layers that did not run
    (experts without tokens in this batch) come last in their unit.
    """
    block_of = {layer: find_block(model, layer) for layer in layers}
    trace = _trace(model, layers, [block for block in dict.fromkeys(block_of.values()) if block], inputs)
    alone = {block for block, calls in trace.calls.items() if calls == 1 and block not in trace.streamless}
    home = {layer: block if block in alone else "" for layer, block in block_of.items()}
    ran = [name for name in trace.order if name in home]
    units: dict[str, list[Group]] = {}
    for layer in ran + [layer for layer in layers if trace.calls[layer] == 0]:
        module = home[layer]
        if not module:
            # Layers outside blocks keep their place in the order: a unit of the whole model for every run of them.
            last = next(reversed(units), "")
            module = last if last.startswith(_WHOLE) else f"{_WHOLE}{len(units)}"
        _place(units.setdefault(module, []), layer, trace)
    return _link(model, units, trace, inputs)


def _place(groups: list[Group], layer: str, trace: _Trace) -> None:
    calls = trace.calls[layer]
    if groups and calls == groups[-1].calls == 1 and trace.same_input.get(layer) == groups[-1].layers[-1]:
        groups[-1] = Group((*groups[-1].layers, layer), 1)
    else:
        groups.append(Group((layer,), calls))


def _trace(model: nn.Module, layers: Sequence[str], blocks: Sequence[str], inputs: Inputs) -> _Trace:
    trace = _Trace()
    installs: list[Callable[[], Any]] = []
    for block in blocks:
        module = model.get_submodule(block)
        installs.append(pre_hook(module, lambda _, args, kwargs, name=block: trace.enter_block(name, args, kwargs)))
        installs.append(post_hook(module, lambda _module, _args, output, name=block: trace.leave_block(name, output)))
    for layer in layers:
        module = model.get_submodule(layer)
        installs.append(pre_hook(module, lambda _, args, kwargs, name=layer: trace.enter_layer(name, args, kwargs)))
    run_hooked(installs, lambda: run_model(model, inputs))
    trace.last_input = trace.last_output = None
    return trace


def _link(model: nn.Module, units: Mapping[str, list[Group]], trace: _Trace, inputs: Inputs) -> tuple[Unit, ...]:
    """Mark the units whose input is the output of the unit before, and whose other arguments do not depend on it."""
    names = list(units)
    chained = [bool(index) and trace.follows.get(name) == names[index - 1] for index, name in enumerate(names)]
    for start, end in _chains(chained):
        hidden, plain = record_calls(model, names[start:end], inputs)
        scale = float(hidden.detach().float().abs().mean()) or 1.0
        _, moved = record_calls(model, names[start:end], inputs, noise=0.5 * scale)
        for index, before, after in zip(range(start, end), plain, moved, strict=True):
            if index > start and not _equal((before.args, before.kwargs), (after.args, after.kwargs)):
                chained[index] = False
    return tuple(
        Unit("" if name.startswith(_WHOLE) else name, tuple(groups), linked)
        for (name, groups), linked in zip(units.items(), chained, strict=True)
    )


def _chains(chained: Sequence[bool]) -> list[tuple[int, int]]:
    """(start, end) of every run of at least two units of which all but the first are chained."""
    starts = [index for index, linked in enumerate(chained) if not linked] + [len(chained)]
    return [(start, end) for start, end in pairwise(starts) if end - start > 1]


def _equal(one: Any, other: Any) -> bool:
    """Equality by value through tensors and plain containers; objects of any other kind must be the same or equal."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one is other or (type(one) is type(other) and bool(one == other))
