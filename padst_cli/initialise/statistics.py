"""Second moments of a layer's inputs, in the sparse model and in the dense one, over the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from padst_cli.errors import PadstError

CHUNK_TOKENS = 8192


class InputStatistics:
    """Sums over calibration tokens for layers that read one input of `in_features`.

    `gram` H = X'^T X' of the inputs in the already sparse model, `cross` C = X'^T X against the dense model's inputs,
    and `dense_gram` G = X^T X; all `[in, in]` float32 sums. Where the two models do not send the same tokens to a layer
    (a router decided otherwise) there are no pairs, and the layer aims at its old outputs on the sparse inputs.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        shape = (in_features, in_features)
        self.tokens = 0
        self.paired = True
        self.gram = torch.zeros(shape, dtype=torch.float32, device=device)
        self._cross = torch.zeros_like(self.gram)
        self._dense_gram = torch.zeros_like(self.gram)

    @property
    def cross(self) -> Tensor:
        """C = X'^T X `[in, in]`, or H where tokens could not be paired."""
        return self._cross if self.paired else self.gram

    @property
    def dense_gram(self) -> Tensor:
        """G = X^T X `[in, in]`, or H where tokens could not be paired."""
        return self._dense_gram if self.paired else self.gram

    def add(self, sparse: Sequence[Tensor], dense: Sequence[Tensor], keep: Tensor | None) -> None:
        """Add the inputs of one batch, a tensor `[..., in]` for every call of the layer.

        `keep` bool, flattened tokens of the batch, leaves padding out; it applies to calls that see every token.
        """
        if [call.shape for call in sparse] != [call.shape for call in dense]:
            self.paired = False
        for index, call in enumerate(sparse):
            rows = _tokens(call, keep)
            self.tokens += rows.shape[0]
            others = _tokens(dense[index], keep) if self.paired else rows
            for x, y in zip(rows.split(CHUNK_TOKENS), others.split(CHUNK_TOKENS), strict=True):
                x, y = x.float(), y.float()
                self.gram.addmm_(x.T, x)
                if self.paired:
                    self._cross.addmm_(x.T, y)
                    self._dense_gram.addmm_(y.T, y)

    def check_finite(self) -> None:
        """Raise `PadstError` where an input was NaN or infinite, in the sparse model or in the dense one."""
        # A sum over a matrix is NaN or infinite as soon as one entry is.
        if not all(bool(torch.isfinite(moment.sum())) for moment in (self.gram, self._cross, self._dense_gram)):
            raise PadstError("the calibration inputs of this layer hold NaN or infinity; check the model and the data")

    def aim(self, dense: Tensor) -> Tensor:
        """A = W C^T `[out, in]` of a dense W `[out, in]`: the right-hand sides of its refit, row by row."""
        return dense.float() @ self.cross.T

    def relative_errors(self, dense: Tensor, aim: Tensor, candidates: Sequence[Tensor]) -> list[float]:
        """`|X W^T - X' S^T|^2 / |X W^T|^2` of a dense W and each sparse S, all `[out, in]` in coordinates of W.

        Numerator and denominator over all calibration tokens and outputs, bias left out. With X' = X this is
        tr((W-S) H (W-S)^T) / tr(W H W^T); later in the model it also counts what earlier sparse layers changed, and it
        is what the refit minimises. `aim` is that of W: with thousands of inputs each product counts. NaN where no
        token was seen or the dense output is zero.
        """
        energy = _dot(dense.float() @ self.dense_gram, dense)
        if energy <= 0.0:
            return [float("nan")] * len(candidates)
        errors = []
        for sparse in candidates:
            mixed, own = _dot(aim, sparse), _dot(sparse.float() @ self.gram, sparse)
            errors.append(max(0.0, (energy - 2.0 * mixed + own) / energy))
        return errors


def _dot(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum(dtype=torch.float64))


def _tokens(call: Tensor, keep: Tensor | None) -> Tensor:
    rows = call.reshape(-1, call.shape[-1])
    if keep is not None and keep.numel() == rows.shape[0]:
        rows = rows[keep.to(rows.device)]
    return rows
