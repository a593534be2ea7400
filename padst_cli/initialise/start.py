"""What the calibration hands to training: one sparse layer's support, weights and permutation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from padst_cli.structures.base import Structure


@dataclass(frozen=True)
class LayerStart:
    """One layer as training starts from it, in the coordinates of S.

    `weight` float32 `[out, in]`, zero outside `mask`; `mask` bool `[out, in]`, a support of `structure`, or of its
    `at_density` where training begins wider; `bias` `[out]` as in the dense model, or None; `perm_in` int32 `[in]` and
    `perm_out` int32 `[out]`, or None where that side has no permutation; `assigned_in` and `assigned_out` likewise, as
    the assignment had them before they were refined (None where nothing was assigned). `error_mask` and `error` are the
    relative output errors of the masked old weights and of the final ones, `|X W^T - X' S^T|^2 / |X W^T|^2` with X the
    dense model's inputs and X' the sparse one's (NaN where no input was seen). `kept` is the share of the saliency that
    the support covers.
    """

    name: str
    structure: Structure
    weight: Tensor
    mask: Tensor
    bias: Tensor | None
    perm_in: Tensor | None
    perm_out: Tensor | None
    error_mask: float
    error: float
    kept: float
    assigned_in: Tensor | None = None
    assigned_out: Tensor | None = None
