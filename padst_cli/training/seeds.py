"""Random draws that are pure functions of where they happen, so that processes agree and a resumed run repeats them."""

from __future__ import annotations

import hashlib

import torch


def seeded(*key: int) -> torch.Generator:
    """A CPU generator for one place in the run, such as (seed, step, layer); neighbouring keys give unrelated draws."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
