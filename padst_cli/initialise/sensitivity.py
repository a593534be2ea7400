"""How much each output of a layer matters to what the whole model says: the half of a saliency that its inputs lack.

A saliency from the inputs alone treats all rows of a layer alike, and a unit that spans rows (a diagonal, a block, a
permutation) is then chosen for the rows whose outputs happen to be large. The sensitivity of output i is E[g_i^2] over
tokens, with g the gradient of -log p(y) with respect to it and y drawn from the model's own prediction: the diagonal of
the output factor of the Kronecker-factored Fisher matrix (Martens and Grosse, 2015, arXiv 1503.05671), whose other
factor is the inputs' H. Of a model without logits it is the same matrix for its hidden states under unit noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from padst_cli.errors import PadstError
from padst_cli.tracing import Inputs, frozen, post_hook, run_hooked, run_model


def output_sensitivity(
    model: nn.Module, names: Sequence[str], batches: Sequence[Inputs], seed: int
) -> dict[str, Tensor]:
    """E[g^2] of the outputs of the layers `names`, each float32 `[out]` and 1 in the mean over the outputs.

    One forward and one backward pass of every batch, one item at a time; no gradient of a weight is made. Tokens that
    `attention_mask` leaves out neither predict nor count. A layer that took no part has 1 everywhere. Deterministic for
    `seed`. Raises `PadstError` where an output, a prediction or a gradient is not finite.
    """
    sums: dict[str, Tensor] = {}
    hooks = [post_hook(model.get_submodule(name), partial(_watch, sums=sums, name=name)) for name in names]
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)

    def run() -> None:
        for batch in batches:
            for item in range(len(next(iter(batch.values())))):
                one = {key: value[item : item + 1] for key, value in batch.items()}
                _surprise(run_model(model, one), one, generator).backward()

    with frozen(model), torch.enable_grad():
        run_hooked(hooks, run)
    return {name: _normalised(name, sums.get(name), model) for name in names}


def _watch(module: nn.Module, inputs: Any, output: Tensor, *, sums: dict[str, Tensor], name: str) -> Tensor:
    """A forward hook that adds the squares of the gradient that comes back to the layer's output."""
    del module, inputs
    _check_finite(output, f"{name}: the outputs of this layer hold NaN or infinity on the calibration data")
    # The first layers' outputs depend on nothing that has a gradient: they become what the rest hangs on.
    watched = output if output.requires_grad else output.detach().requires_grad_()

    def add(gradient: Tensor) -> None:
        squares = gradient.detach().float().flatten(0, -2).square().sum(0)
        sums[name] = sums[name] + squares if name in sums else squares

    watched.register_hook(add)
    # A model may go on in place (`mlp_output += residual`), which a leaf does not bear.
    return watched.clone() if watched.is_leaf else watched


def _surprise(output: Any, batch: Inputs, generator: torch.Generator) -> Tensor:
    """-log p(y) of predictions y drawn from the model's own, summed; of hidden states, those plus unit noise."""
    logits = getattr(output, "logits", None)
    if logits is None:
        hidden = output if isinstance(output, Tensor) else output.last_hidden_state
        noise = torch.randn(hidden.shape, generator=generator, device=hidden.device, dtype=torch.float32)
        return (_kept(hidden, batch).float() * _kept(noise, batch)).sum()
    flat = _kept(logits, batch).float().flatten(0, -2)
    _check_finite(flat, "the dense model's predictions on the calibration data hold NaN or infinity")
    with torch.no_grad():
        drawn = torch.multinomial(flat.softmax(-1), 1, generator=generator)[:, 0]
    return F.cross_entropy(flat, drawn, reduction="sum")


def _check_finite(values: Tensor, complaint: str) -> None:
    # A sum is NaN or infinite as soon as one entry is.
    if not bool(torch.isfinite(values.detach().float().sum())):
        raise PadstError(f"{complaint}; check the model and the data")


def _kept(values: Tensor, batch: Inputs) -> Tensor:
    """What stands at tokens that count, `[tokens, ...]`; all of it where a value belongs to no token."""
    keep = batch.get("attention_mask")
    if keep is None or keep.shape != values.shape[:2] or values.dim() != 3:
        return values
    return values[keep.bool()]


def _normalised(name: str, total: Tensor | None, model: nn.Module) -> Tensor:
    if total is None:
        weight = model.get_submodule(name).get_parameter("weight")
        return torch.ones(1, device=weight.device)
    if not bool(total.isfinite().all()):
        raise PadstError(
            f"{name}: the gradient of the calibration loss is not finite; check the checkpoint and the data"
        )
    return total / total.mean().clamp_min(torch.finfo(total.dtype).tiny)
