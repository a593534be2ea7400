"""Permutations as index vectors: check, invert, compose, and carry a matrix between the coordinates of W and of S.

A layer is `y = ((S (x[..., perm_in]))[..., perm_out]) + b`. `perm_in` [in] says which input each column of S reads, so
`W[:, perm_in] = S`; `perm_out` [out] says which row of S each output reads, so `W = S[perm_out]`. Either may be None,
which stands for the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from padst_cli.errors import PadstError


def check_permutation(perm: Tensor, size: int, name: str) -> None:
    """Raise `PadstError` unless `perm` is an int32 bijection of `range(size)`; `name` is for the message."""
    if perm.dtype != torch.int32 or perm.shape != (size,):
        raise PadstError(
            f"permutation '{name}' is {perm.dtype} {list(perm.shape)}, expected torch.int32 [{size}]; "
            "the file is damaged or was written by another version of padst"
        )
    if size and not torch.equal(perm.sort().values, torch.arange(size, dtype=torch.int32, device=perm.device)):
        raise PadstError(
            f"permutation '{name}' does not hold every index from 0 to {size - 1} exactly once; the file is damaged"
        )


def identity(size: int, device: torch.device | str | None = None) -> Tensor:
    """The permutation that moves nothing, int32 `[size]`."""
    return torch.arange(size, dtype=torch.int32, device=device)


def random_permutation(size: int, generator: torch.Generator) -> Tensor:
    """A uniformly drawn permutation, int32 `[size]`, on the generator's device."""
    return torch.randperm(size, generator=generator, device=generator.device).to(torch.int32)


def invert(perm: Tensor) -> Tensor:
    """The inverse, int32 `[d]`: `invert(perm)[perm[i]] == i`."""
    inverse = torch.empty_like(perm)
    inverse[perm.long()] = torch.arange(perm.numel(), dtype=perm.dtype, device=perm.device)
    return inverse


def compose(first: Tensor, then: Tensor) -> Tensor:
    """One index vector for two remaps in a row: `x[compose(first, then)] == x[first][then]`, int32 `[d]`."""
    return first[then.long()]


def permute_columns(weight: Tensor, perm_in: Tensor | None) -> Tensor:
    """`W[:, perm_in]`, `[out, in]`: the columns in the order in which S reads its inputs."""
    return weight if perm_in is None else weight[:, perm_in.long()]


def to_structure(weight: Tensor, perm_in: Tensor | None, perm_out: Tensor | None) -> Tensor:
    """Carry W `[out, in]` (or a matrix over its entries) into the coordinates of S; inverse of `from_structure`."""
    rows = weight if perm_out is None else weight[invert(perm_out).long()]
    return permute_columns(rows, perm_in)


def from_structure(weight: Tensor, perm_in: Tensor | None, perm_out: Tensor | None) -> Tensor:
    """Carry S `[out, in]` (or its mask) into the coordinates of W, the ones a dense layer holds."""
    columns = weight if perm_in is None else weight[:, invert(perm_in).long()]
    return columns if perm_out is None else columns[perm_out.long()]
