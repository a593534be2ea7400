"""Layouts without any module around them, and what they must compute."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from padst_kernels.cpu import library, native
from padst_kernels.dispatch import Layout
from torch import Tensor

from padst_cli.permutation.apply import from_structure, random_permutation, to_structure
from padst_cli.structures import StructureOptions, structure_class

# `make sanitize` runs these tests on a build of its own, with images in memory that ends where they end.
if "PADST_TEST_LIBRARY" in os.environ:
    library.find = lambda: Path(os.environ["PADST_TEST_LIBRARY"])
    native.image_memory = lambda size: torch.empty(size, dtype=torch.uint8)


@dataclass
class Case:
    layout: Layout
    weight: Tensor  # W [out, in], the oracle's matrix
    values_of: Callable[[Tensor], Tensor]  # the packed values of another such matrix, outside the support whatever


@pytest.fixture(scope="session")
def make_case():
    def make(structure, out_features, in_features, density=0.2, sides="", dtype=torch.float32, **options) -> Case:
        generator = torch.Generator().manual_seed(out_features * 1000 + in_features)
        spec = structure_class(structure).for_density(out_features, in_features, density, StructureOptions(**options))
        weight = torch.randn(out_features, in_features, generator=generator)
        mask = spec.project(weight.abs())
        weight = (weight * mask).to(dtype)
        perm_in = random_permutation(in_features, generator) if "i" in sides else None
        perm_out = random_permutation(out_features, generator) if "o" in sides else None
        dense = from_structure(weight, perm_in, perm_out)
        layout = Layout(
            structure=structure,
            out_features=out_features,
            in_features=in_features,
            density=spec.density,
            parameters=spec.parameters(),
            tensors=spec.pack(weight, mask),
            perm_in=perm_in,
            perm_out=perm_out,
            materialise=lambda: dense,
        )

        def values_of(other: Tensor) -> Tensor:
            return spec.pack(to_structure(other, perm_in, perm_out).where(mask, 0), mask)["values"]

        return Case(layout, dense, values_of)

    return make


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
