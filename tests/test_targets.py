"""Which layers become sparse: the default ones, those that are named, heads that share their weight."""

import pytest
import torch
from torch import nn

from padst_cli.errors import PadstError
from padst_cli.recipe import Recipe
from padst_cli.targets import find_targets
from tests import models


def names(model, *targets, ignore=()):
    found, skipped = find_targets(model, Recipe(targets=targets, ignore=ignore))
    return [target.name for target in found], {skip.name: skip.reason for skip in skipped}


def test_default_and_head_together():
    model = models.build("gpt2")
    plain, skipped = names(model)
    assert len(plain) == 8
    assert skipped["lm_head"].endswith("add --targets default --targets lm_head to include it")
    with_head, skipped = names(model, "default", "lm_head")
    assert with_head == [*plain, "lm_head"]
    assert not skipped
    assert names(model, "default")[0] == plain
    assert names(model, "lm_head")[0] == ["lm_head"]
    assert names(model, "re:.")[0] == with_head
    assert names(model, "default", "lm_head", ignore=("h.0",))[0] == [name for name in with_head if ".h.0." not in name]


@pytest.mark.parametrize(
    ("family", "changes", "head", "tied"),
    [
        ("gpt2", {}, "lm_head", True),
        ("llama", {"tie_word_embeddings": True}, "lm_head", True),
        ("llama", {}, "lm_head", False),
        ("gpt-neox", {}, "lm_head", False),
        ("opt", {}, "lm_head", True),
        ("bert-mlm", {}, "cls.predictions.decoder", True),
    ],
)
def test_heads_are_found_by_name_in_every_family(family, changes, head, tied):
    with torch.device("meta"):
        model = models.build(family, **changes)
    targets, _ = find_targets(model, Recipe(targets=("default", head)))
    assert targets[-1].name == head
    assert targets[-1].tied == tied
    assert not any(target.tied for target in targets[:-1])


class Twins(nn.Module):
    """Two layers with one weight, and no config that could part them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)])
        self.layers[1].weight = self.layers[0].weight


def test_a_weight_shared_by_no_switch_stays_dense():
    found, skipped = names(Twins())
    assert found == ["layers.2"]
    assert set(skipped) == {"layers.0", "layers.1"}
    assert "no switch" in skipped["layers.0"]


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(PadstError, match=r"--targets 'lm_heat' matches no linear layer.*lm_head"):
        names(models.build("gpt2"), "default", "lm_heat")
    with pytest.raises(PadstError, match="--ignore 'default' matches no linear layer"):
        names(models.build("gpt2"), ignore=("default",))
