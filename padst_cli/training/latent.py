"""The mark of a latent weight, and what its projection weighs entries by: the mean squares of the layer's inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Latent(nn.Module):
    """There while a layer's weight is latent: values outside the mask are trained too, though no product uses them.

    Holds E[x^2] over all inputs since the last `forget` as two sums: `squares` `[in]`, in the order of W's columns,
    and `rows`, a scalar.
    """

    def __init__(self, in_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.squares: Tensor
        self.rows: Tensor
        # Sums over thousands of rows lose too much in half precision.
        wide = torch.promote_types(dtype, torch.float32)
        self.register_buffer("squares", torch.zeros(in_features, dtype=wide))
        self.register_buffer("rows", torch.zeros((), dtype=wide))

    @torch.no_grad()
    def see(self, x: Tensor) -> None:
        """Add the inputs `x` `[..., in]` of one forward pass."""
        flat = x.detach().flatten(0, -2).to(self.squares.dtype)
        self.squares += flat.square().sum(0)
        self.rows += len(flat)

    @property
    def has_seen(self) -> bool:
        """Whether there were inputs since the last `forget`."""
        return bool(self.rows > 0)

    def mean_squares(self) -> Tensor:
        """E[x^2] `[in]`, only once it `has_seen` inputs."""
        return self.squares / self.rows

    def forget(self) -> None:
        """Begin a new mean."""
        self.squares.zero_()
        self.rows.zero_()
