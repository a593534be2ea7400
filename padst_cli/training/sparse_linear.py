"""The layer that is trained: a masked weight S between two permutations, soft while they are learned, then an index.

`y = ((S (x[..., perm_in]))[..., perm_out]) + b` with S zero outside its mask (DESIGN.md). While a side is soft, its
index lookup is a matrix product with M. Whatever the weight holds outside the mask never reaches the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from padst_kernels.cpu.training import TrainingKernel, pays, serves
from padst_kernels.gpu import rules as gpu
from padst_kernels.gpu.paths import DENSE, fastest_by_tokens, signature_of
from padst_kernels.plain import version_of
from padst_kernels.steps import Steps
from torch import Tensor, nn

from padst_cli.structures.base import Structure
from padst_cli.training.dynadiag import DiagonalGates
from padst_cli.training.latent import Latent
from padst_cli.training.permutation import Permutation

if TYPE_CHECKING:
    from padst_kernels.gpu.training import TritonTraining

DENSE_PRODUCT = "torch-dense-masked"
"""The name of the product that does not skip zeros."""


class _Masked(torch.autograd.Function):
    """S on its support, with the gradient of the *dense* matrix handed back: growth is decided from it (RigL)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        del ctx
        # A product would turn an infinity outside the support into NaN.
        return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        del ctx
        return grads[0], None


class SparseLinear(nn.Module):
    """A linear layer with a structured sparse weight S `[out, in]` and up to two permutations.

    `weight` is a Parameter over all of `[out, in]`. Its `.grad` is dense where `dense_gradient` asks for it, so that
    support updates can look outside the mask, and may be dense otherwise: whoever steps it must zero it outside `mask`
    first, except where a `latent` weight wants all of it (`training/projected.py`). Input `[..., in]`, output
    `[..., out]`.

    The product with S runs on kernels that skip its zeros where these serve and pay (`padst_kernels`), else as
    a dense product with the masked weight. A permutation that is an index is folded into the kernel.
    """

    def __init__(
        self,
        structure: Structure,
        weight: Tensor,
        mask: Tensor,
        bias: Tensor | None,
        perm_in: Permutation | None = None,
        perm_out: Permutation | None = None,
        gates: DiagonalGates | None = None,
        latent: Latent | None = None,
    ) -> None:
        super().__init__()
        self.mask: Tensor
        self.structure = structure
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
        self.bias = None if bias is None else nn.Parameter(bias.clone())
        self.register_buffer("mask", mask.clone())
        self.perm_in = perm_in
        self.perm_out = perm_out
        self.gates = gates
        self.latent = latent
        self.dense_gradient = True
        self.computed_by: str | None = None
        """What computed the last product with S."""
        self._counted = (-1, 0.0)
        self._packable = (-1, False)
        self._measured: tuple[tuple[torch.device, torch.dtype], Steps[str]] | None = None
        self._block_size: int | None = structure.parameters().get("block_size")
        self._kernel: TrainingKernel | TritonTraining | None = None

    @property
    def density(self) -> float:
        """The share of entries in the present mask, which is wider than the structure while the density falls."""
        if self._counted[0] != version_of(self.mask):
            self._counted = (version_of(self.mask), float(self.mask.sum()) / self.mask.numel())
        return self._counted[1]

    def effective_weight(self) -> Tensor:
        """S `[out, in]` as the forward pass uses it, exactly zero outside the mask."""
        if self.gates is not None:
            return self.gates.apply_to(self.weight, self.mask)
        masked: Tensor = _Masked.apply(self.weight, self.mask)
        return masked

    @torch.no_grad()
    def fold_gates(self) -> None:
        """Multiply DynaDiag's gates into the weight and drop them and all latent values; nothing without gates."""
        if self.gates is not None:
            self.weight.copy_(self.effective_weight())
            self.gates = None

    @torch.no_grad()
    def drop_latent(self) -> None:
        """Zero all values outside the mask and be an ordinary layer; nothing where the weight is not latent."""
        if self.latent is not None:
            self.weight.masked_fill_(~self.mask, 0.0)
            self.latent = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x` `[..., in]`."""
        if self.latent is not None and self.training and self.dense_gradient:
            self.latent.see(x)
        soft_in, soft_out = (
            perm if perm is not None and perm.is_soft else None for perm in (self.perm_in, self.perm_out)
        )
        if soft_in is not None:
            x = soft_in(x)
        bias = self.bias if soft_out is None else None
        kernel = self._kernel_for(x)
        self.computed_by = DENSE_PRODUCT if kernel is None else kernel.name
        if kernel is not None:
            y = kernel(x, self.weight, bias, self.dense_gradient)
        else:
            y = self._dense_product(x, bias)
        if soft_out is not None:
            y = soft_out(y)
            if self.bias is not None:
                y = y + self.bias.to(y.dtype)
        return y

    def _sides(self, soft: bool) -> tuple[Permutation | None, Permutation | None]:
        """The permutations of (input, output) that are soft, or those that are not; None in the place of others."""
        sides = (self.perm_in, self.perm_out)
        perm_in, perm_out = (perm if perm is not None and perm.is_soft == soft else None for perm in sides)
        return perm_in, perm_out

    def _kernel_for(self, x: Tensor) -> TrainingKernel | TritonTraining | None:
        """The kernel that serves and pays, if any, made anew when the support or an index has changed."""
        tokens = x.shape[:-1].numel()
        perms = tuple(perm.index if perm is not None else None for perm in (self.perm_in, self.perm_out))
        if self.gates is not None:
            return None
        make: Callable[..., TrainingKernel | TritonTraining]
        if serves(x, self.weight) and pays(self.density, tokens, self._block_size):
            make = partial(TrainingKernel, block_size=self._block_size)
        elif gpu.trains(x, self.weight) and self._pays_on_gpu(x.device, gpu.product_dtype(x), tokens):
            make = partial(_on_gpu, self.structure)
        else:
            return None
        if self._kernel is None or not self._kernel.fits(self.mask, *perms):
            self._kernel = make(self.mask, *perms)
        return self._kernel

    def _pays_on_gpu(self, device: torch.device, dtype: torch.dtype, tokens: int) -> bool:
        """Whether Triton kernels pay, as was measured or is ruled; they take the support as the structure packs it, not
        a wider one.
        """
        if self._measured is None or self._measured[0] != (device, dtype):
            self._measured = (device, dtype), fastest_by_tokens(self.gpu_signature(dtype), device)
        fastest = self._measured[1].at(tokens)
        rule = gpu.training_pays(self.structure.name, self.structure.parameters(), self.structure.density)
        if not (rule if fastest is None else fastest != DENSE):
            return False
        if self._packable[0] != version_of(self.mask):
            self._packable = (version_of(self.mask), self.structure.is_feasible(self.structure.units_of(self.mask)))
        return self._packable[1]

    def gpu_signature(self, dtype: torch.dtype) -> str:
        """The name of layers like this one among a GPU's figures, for products of `dtype`."""
        shape, entries = (self.out_features, self.in_features), round(self.structure.density * self.mask.numel())
        sides = (key for key in ("perm_in", "perm_out") if getattr(self, key) is not None)
        kinds = self.weight.dtype, dtype
        return signature_of(
            self.structure.name, shape, self.structure.parameters(), entries, kinds, sides, training=True
        )

    def gpu_products(self, x: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
        """What a GPU may compute the layer by for inputs like x, by name: `[..., in] -> [..., out]` each.

        For layers whose permutations have hardened, with the present support.
        """
        products: dict[str, Callable[[Tensor], Tensor]] = {DENSE: partial(self._dense_product, bias=self.bias)}
        if gpu.trains(x, self.weight):
            perms = (None if perm is None else perm.index for perm in (self.perm_in, self.perm_out))
            kernel = _on_gpu(self.structure, self.mask, *perms)
            products[kernel.name] = lambda u: kernel(u, self.weight, self.bias, self.dense_gradient)
        return products

    def _dense_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same through the masked weight, zeros and all; permutations that are soft are the caller's."""
        perm_in, perm_out = self._sides(soft=False)
        if perm_in is not None:
            x = perm_in(x)
        if perm_out is None:
            return F.linear(x, self.effective_weight(), bias)
        y: Tensor = perm_out(F.linear(x, self.effective_weight()))
        return y if bias is None else y + bias.to(y.dtype)

    def __getstate__(self) -> dict[str, Any]:
        # Kernels hold addresses: a copy makes its own.
        return {**self.__dict__, "_kernel": None}

    def permutations(self) -> Iterator[tuple[str, Permutation]]:
        """The sides that have a permutation: ("input" or "output", module)."""
        if self.perm_in is not None:
            yield "input", self.perm_in
        if self.perm_out is not None:
            yield "output", self.perm_out

    def extra_repr(self) -> str:
        """The shape and the structure, for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, structure={self.structure.name}"


def _on_gpu(structure: Structure, mask: Tensor, perm_in: Tensor | None, perm_out: Tensor | None) -> TritonTraining:
    """The Triton kernels of a support, which is packed as 1 + the places in the flat weight."""
    from padst_kernels.gpu.training import TritonTraining  # imports triton, which a machine without a GPU may lack

    numbers = torch.arange(1, mask.numel() + 1, device=mask.device).view(mask.shape)
    places = structure.pack(torch.where(mask, numbers, 0), mask)
    return TritonTraining(structure.name, structure.parameters(), mask, places, perm_in, perm_out)


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """All sparse layers of a model by dotted name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def mean_density(layers: Iterable[SparseLinear]) -> float:
    """The share of entries in the masks of all layers together."""
    sizes = [(layer.density, layer.mask.numel()) for layer in layers]
    return sum(density * size for density, size in sizes) / sum(size for _, size in sizes)
