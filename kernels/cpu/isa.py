"""The instruction sets of the compiled kernels, and the most that the user allows."""

from __future__ import annotations

import os

ISAS = ("portable", "avx2", "avx512")
"""From the least to the most, numbered as in csrc/padst.h."""

VARIABLE = "PADST_ISA"


def allowed() -> str:
    """The most that kernels may use: what the environment variable PADST_ISA names, else all that there is.

    Raises ValueError for a name that is none of `ISAS`.
    """
    name = os.environ.get(VARIABLE) or ISAS[-1]
    if name not in ISAS:
        raise ValueError(f"the environment variable {VARIABLE} is '{name}': set it to {', '.join(ISAS)}, or unset it")
    return name
