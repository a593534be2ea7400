"""Pictures of supports: what a pixel says, and how many there are."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from padst_cli.report import Support
from padst_cli.report.supports import LONGEST, data_url, pool


def _pixels(png: bytes) -> torch.Tensor:
    image = Image.open(io.BytesIO(png)).convert("L")
    return torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(image.height, image.width)


def test_small_masks_are_drawn_entry_by_entry() -> None:
    mask = torch.eye(8, 24, dtype=torch.bool)
    picture = Support.from_masks(mask, mask)
    assert (picture.width, picture.height) == (24, 8)
    assert torch.equal(_pixels(picture.after) == 0, mask)
    assert torch.equal(_pixels(picture.after) == 255, ~mask)
    assert picture.before == picture.after


@pytest.mark.parametrize("shape", [(3072, 768), (768, 3072), (97, 4), (100, 100), (1, 5000), (97, 97)])
def test_large_masks_are_pooled(shape: tuple[int, int]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.1
    pooled = pool(mask)
    assert max(pooled.shape) <= LONGEST
    assert min(pooled.shape) >= 1
    assert float(pooled.min()) >= 0
    assert float(pooled.max()) <= 1
    if shape[0] % 96 == shape[1] % 96 == 0:
        assert float(pooled.mean()) == pytest.approx(float(mask.float().mean()), abs=1e-4)


def test_permuted_mask_looks_different_and_the_pair_shares_its_scale() -> None:
    mask = torch.zeros(192, 192, dtype=torch.bool)
    mask[:96, :96] = True
    order = torch.randperm(192, generator=torch.Generator().manual_seed(1))
    picture = Support.from_masks(mask, mask[:, order])
    assert int(_pixels(picture.after).min()) == 0
    assert sorted(set(_pixels(picture.after).flatten().tolist())) == [0, 255]
    assert picture.before != picture.after


def test_empty_mask_is_white() -> None:
    empty = torch.zeros(4, 4, dtype=torch.bool)
    assert int(_pixels(Support.from_masks(empty, empty).after).min()) == 255


def test_picture_is_small() -> None:
    mask = torch.rand(768, 768, generator=torch.Generator().manual_seed(2)) < 0.1
    picture = Support.from_masks(mask, mask)
    assert len(data_url(picture.before)) < 9000
