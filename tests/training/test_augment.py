"""Random crops of images: where they come from, and that they are the same whoever draws them."""

import pytest
import torch

from padst_cli.recipe import TrainingRecipe
from padst_cli.training.augment import LEAST_AREA, augmented
from padst_cli.training.objective import build_objective
from padst_cli.training.remembered import worth_remembering
from tests import models


def ramps(count: int, size: int = 64) -> torch.Tensor:
    """Images whose first channel is the place across and whose second is the place down, from -1 to 1."""
    place = (torch.arange(size) + 0.5) / size * 2 - 1
    image = torch.stack([place.expand(size, size), place[:, None].expand(size, size)])
    return image.expand(count, 2, size, size).contiguous()


def test_a_crop_is_a_rectangle_of_the_image():
    found = augmented(ramps(200), 0, 5, 0)
    across, down = found[:, 0], found[:, 1]
    torch.testing.assert_close(across, across[:, :1].expand_as(across), rtol=0, atol=1e-5)
    torch.testing.assert_close(down, down[:, :, :1].expand_as(down), rtol=0, atol=1e-5)
    assert found.abs().max() <= 1.0
    width, height = across[:, 0, -1] - across[:, 0, 0], down[:, -1, 0] - down[:, 0, 0]
    assert (height > 0).all()
    assert 60 < (width < 0).sum() < 140, "half of them are mirrored"
    area = width.abs() * height / 4 * (64 / 63) ** 2
    assert LEAST_AREA * 0.95 < area.min() < 0.35
    assert area.max() > 0.85
    ratio = width.abs() / height
    assert 0.7 < ratio.min() < 0.85 < 1.2 < ratio.max() < 1.4
    assert torch.unique(width).numel() > 150, "but for those as wide as the image, no two are alike"


def test_draws_depend_on_seed_step_and_row_alone():
    images = ramps(6)
    whole = augmented(images, 3, 8, 40)
    assert torch.equal(torch.cat([augmented(images[:2], 3, 8, 40), augmented(images[2:], 3, 8, 42)]), whole)
    for other in ((4, 8, 40), (3, 9, 40), (3, 8, 46)):
        assert not torch.isclose(augmented(images, *other), whole).all(dim=(1, 2, 3)).any()


@pytest.mark.parametrize("asked", [False, True])
def test_student_and_teacher_see_the_crop_where_the_recipe_asks_for_it(asked):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}
    teacher, student = (models.build("vit", seed, **sizes) for seed in (0, 1))
    recipe = TrainingRecipe(augment=asked, distill_weight=1.0, steps=100, batch_size=4)
    objective = build_objective("image-classification", recipe, teacher)
    images = torch.randn(4, 3, 8, 8)
    batch = objective.prepare({"pixel_values": images, "labels": torch.zeros(4, dtype=torch.long)}, 1, 2, 0)
    seen = augmented(images, 1, 2, 0) if asked else images
    assert torch.equal(batch["pixel_values"], seen)
    loss, _ = objective(student, batch)
    ours, theirs = (model(pixel_values=seen).logits.log_softmax(-1) for model in (student, teacher))
    torch.testing.assert_close(loss, (theirs.exp() * (theirs - ours)).sum(-1).mean())
    assert worth_remembering(objective, 4, recipe) is not asked
