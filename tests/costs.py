"""Made-up costs of a machine, so that no test measures one and every choice is known beforehand."""

from __future__ import annotations

from padst_kernels.cost import TOKENS, Costs, Curve, Unpack

FAMILIES = ("diag", "nm2", "nm4", "nm8", "block")
DTYPES = ("float32", "bfloat16", "float16")


def curve(rate: float, call: float = 0.0) -> Curve:
    """`rate` seconds an entry and token, nothing for features."""
    return Curve(call, (0.0,) * len(TOKENS), tuple(rate * tokens for tokens in TOKENS))


def costs(kernel: float, dense: float, unpack: float, call: float = 0.0) -> Costs:
    """Seconds an entry and token of kernels and of dense products, seconds an entry of unpacking."""
    keys = [f"{family} {dtype}" for family in FAMILIES for dtype in DTYPES[:2]]
    return Costs(
        {key: curve(kernel, call) for key in keys},
        {key: Unpack(call, unpack, 0.0) for key in keys},
        {dtype: curve(dense, call) for dtype in DTYPES},
    )


SPARSE_ONLY = costs(kernel=1e-12, dense=1e-9, unpack=1e-9)
"""Kernels always win."""

DENSE_WINS = costs(kernel=1e-9, dense=1e-10, unpack=0.0)
"""Unpacking and a dense product win at any token count where the density is over a tenth."""
