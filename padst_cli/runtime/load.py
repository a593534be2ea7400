"""Opening a model to run it: dense or sparse, by hub id or folder, on the device and in the dtype asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from padst_cli.checkpoint.reader import Source, from_pretrained, load_dense, load_processor, open_source
from padst_cli.errors import PadstError, nearest
from padst_cli.runtime import quantizer as _registers_the_format  # noqa: F401
from padst_cli.runtime.fusion import fuse

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode with its tokenizer or image processor (None where the folder holds none)."""

    model: Any
    processor: Any | None
    source: Source

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        device: torch.device = next(self.model.parameters()).device
        return device


def load(
    model: str,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    fused: bool = False,
) -> Loaded:
    """Open a hub id, a dense transformers folder or a folder that padst wrote.

    `device` auto takes a GPU where there is one. `dtype` is that of activations and dense weights; None means float32
    on the CPU and the stored dtype elsewhere; packed values keep their stored dtype either way. `fused` lets the packed
    layers compute the activations behind them, the faster way to run a model that nothing else is hung on
    (`fusion.py`). Raises `PadstError` for everything that is wrong with the model, the device or the dtype.
    """
    where = resolve_device(device)
    source = open_source(model, revision=revision)
    loaded = load_source(source, device=where, dtype=dtype)
    if fused:
        fuse(loaded.model)
    return loaded


def load_source(
    source: Source, *, device: str | torch.device = "auto", dtype: str | torch.dtype | None = None
) -> Loaded:
    """As `load`, for a source that is already open."""
    where = resolve_device(device)
    wanted = resolve_dtype(dtype)
    if wanted is None:
        wanted = torch.float32 if where.type == "cpu" else _stored_dtype(source)
    if source.padst is None:
        network = load_dense(source, dtype=wanted, device=where)
    else:
        network = from_pretrained(source, dtype=wanted)[0].to(where).eval()
    return Loaded(model=network, processor=load_processor(source), source=source)


def resolve_device(device: str | torch.device) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:1` as a device; raises `PadstError` where it is unknown or not there."""
    if isinstance(device, torch.device):
        return device
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise PadstError(f"unknown device '{device}'; choose auto, cpu or cuda") from None
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        raise PadstError(f"device '{device}' was asked for, but torch finds no such GPU on this machine")
    return found


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype by name, itself, or None; raises `PadstError` that names the choices."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise PadstError(f"unknown dtype '{dtype}'{nearest(dtype, list(DTYPES))}; choose one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _stored_dtype(source: Source) -> torch.dtype:
    stored = getattr(source.config, "dtype", None)
    if stored is None or isinstance(stored, torch.dtype):
        return stored or torch.float32
    return DTYPES[str(stored).removeprefix("torch.")]
