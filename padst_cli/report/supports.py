"""Small pictures of supports: where a layer's nonzeros lie before and after its permutation."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from typing import Final

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

LONGEST: Final = 96
"""Pixels of a picture's longer edge."""
_SHADES: Final = 16


@dataclass(frozen=True)
class Support:
    """Two PNG pictures of one layer's support: in the model's own order (W), and in the structure's (S).

    The darker a pixel, the denser the entries under it; black is the densest pixel of the two pictures.
    """

    before: bytes
    after: bytes
    width: int
    height: int

    @classmethod
    def from_masks(cls, mask_s: Tensor, mask_w: Tensor) -> Support:
        """Draw the bool masks `[out, in]` of S and of W = from_structure(S), pooled to at most 96 pixels an edge."""
        pooled_s, pooled_w = pool(mask_s), pool(mask_w)
        peak = max(float(pooled_s.max()), float(pooled_w.max()))
        height, width = pooled_s.shape
        return cls(_png(pooled_w, peak), _png(pooled_s, peak), width, height)


def pool(mask: Tensor) -> Tensor:
    """Mean density `[height, width]` of the cells of a bool mask `[out, in]`; one of up to 96 an edge stays as it is.

    Cells are as even as the shape allows, as in adaptive average pooling.
    """
    out_features, in_features = mask.shape
    shrink = max(1.0, max(out_features, in_features) / LONGEST)
    shape = (max(1, math.floor(out_features / shrink)), max(1, math.floor(in_features / shrink)))
    return functional.adaptive_avg_pool2d(mask.to(torch.float32)[None, None], shape)[0, 0]


def data_url(png: bytes) -> str:
    """The picture as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _png(pooled: Tensor, peak: float) -> bytes:
    share = pooled / peak if peak > 0 else pooled
    # Density reads on a square-root scale: a lone entry in a cell must not vanish beside a full one.
    shade = ((_SHADES - 1) * (1 - share.sqrt())).round().to(torch.uint8).cpu().numpy()
    image = Image.frombytes("P", shade.shape[::-1], shade.tobytes())
    image.putpalette([channel for level in range(_SHADES) for channel in (level * 17,) * 3])
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", bits=4, optimize=True)
    return buffer.getvalue()
