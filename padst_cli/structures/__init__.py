"""Sparsity structures: one file each, all after the contract in `base`."""

from padst_cli.structures import block, diagonal, nm, unstructured
from padst_cli.structures.base import (
    DoesNotFit,
    Structure,
    StructureOptions,
    structure_class,
    structure_names,
)

__all__ = [
    "DoesNotFit",
    "Structure",
    "StructureOptions",
    "block",
    "diagonal",
    "nm",
    "structure_class",
    "structure_names",
    "unstructured",
]
