"""Running one unit of a model batch by batch, and catching what its layers read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from padst_cli.initialise.blocks import Call, Group, Unit, first_tensor, record_calls, split_call
from padst_cli.tracing import Inputs, Stop, pre_hook, run_hooked, run_model


@dataclass(frozen=True)
class _Position:
    """Where one batch stands: the hidden states that enter the present block, and the other arguments from here on."""

    hidden: Tensor
    calls: Sequence[Call]


class Stream:
    """The calibration batches on their way through one model, unit by unit.

    Inside a chain of blocks only the hidden states travel, `[batch, tokens, hidden]` for each batch; where a chain
    starts they are taken from a pass of the whole model as it then is, so that nothing is approximated.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit], batches: Sequence[Inputs]) -> None:
        self._model = model
        self._units = units
        self._batches = batches
        self._index = -1
        self._positions: list[_Position] = []

    def advance(self) -> None:
        """Move to the next unit; the one left behind is run in its final state."""
        self._index += 1
        unit = self._units[self._index]
        if unit.chained:
            self._positions = [self._after(position) for position in self._positions]
        elif unit.module:
            self._positions = [_Position(*record_calls(self._model, self._chain(), batch)) for batch in self._batches]
        else:
            self._positions = []

    def layer_inputs(self, group: Group, batch: int) -> list[Tensor]:
        """The inputs `[..., in]` that a group of the present unit reads in one batch, one tensor for every call."""
        layer = self._model.get_submodule(group.layers[0])
        caught: list[Tensor] = []

        def catch(module: nn.Module, args: Any, kwargs: Any) -> None:
            del module
            read, _ = split_call(args, kwargs)
            assert read is not None
            caught.append(read)
            if len(caught) == group.calls:
                raise Stop

        run_hooked([pre_hook(layer, catch)], lambda: self._run(batch))
        return caught

    def _run(self, batch: int) -> Any:
        unit = self._units[self._index]
        if not unit.module:
            return run_model(self._model, self._batches[batch])
        return _run_block(self._model.get_submodule(unit.module), self._positions[batch])

    def _after(self, position: _Position) -> _Position:
        module = self._model.get_submodule(self._units[self._index - 1].module)
        hidden = first_tensor(_run_block(module, position))
        assert hidden is not None
        return _Position(hidden, position.calls[1:])

    def _chain(self) -> list[str]:
        end = self._index + 1
        while end < len(self._units) and self._units[end].chained:
            end += 1
        return [unit.module for unit in self._units[self._index : end]]


def _run_block(block: nn.Module, position: _Position) -> Any:
    # A copy, because the same hidden states run again for the next group and a block may write into its input.
    args, kwargs = position.calls[0].with_stream(position.hidden.clone())
    return block(*args, **kwargs)
