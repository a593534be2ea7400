import pytest
import torch
from torch import Tensor, nn

from padst_cli.initialise.blocks import find_block, find_units
from padst_cli.plan import make_plan
from padst_cli.recipe import Recipe

RECIPE = Recipe(structure="unstructured", sparsity=0.5)
LLAMA_GROUPS = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


@pytest.fixture
def units_of(make_model, make_batches):
    def find(name: str):
        model = make_model(name)
        layers = [layer.name for layer in make_plan(model, RECIPE).layers]
        units = find_units(model, layers, {k: v for k, v in make_batches(name)[0].items() if k != "labels"})
        found = [layer for unit in units for group in unit.groups for layer in group.layers]
        assert sorted(found) == sorted(layers)
        return units

    return find


def tails(unit) -> list[list[str]]:
    return [[layer.rpartition(".")[2] for layer in group.layers] for group in unit.groups]


@pytest.mark.parametrize(
    ("name", "blocks", "groups"),
    [
        ("gpt2", "transformer.h", [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]]),
        (
            "llama",
            "model.layers",
            [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
        ),
        (
            "qwen3",
            "model.layers",
            [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
        ),
        ("gpt-neox", "gpt_neox.layers", [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]]),
    ],
)
def test_decoders_are_one_chain_of_blocks(units_of, name: str, blocks: str, groups: list[list[str]]) -> None:
    units = units_of(name)
    assert [unit.module for unit in units] == [f"{blocks}.{index}" for index in range(3)]
    assert [unit.chained for unit in units] == [False, True, True]
    assert tails(units[1]) == groups


@pytest.mark.parametrize("name", ["opt", "bert", "vit"])
def test_other_stacks_are_one_chain_whose_attention_shares_its_input(units_of, name: str) -> None:
    units = units_of(name)
    assert [unit.chained for unit in units] == [False, True, True]
    assert all(len(unit.groups[0].layers) == 3 and len(unit.groups) == 4 for unit in units)


def test_encoder_and_decoder_are_two_chains(units_of) -> None:
    units = units_of("t5")
    assert [unit.module for unit in units] == [f"{part}.block.{i}" for part in ("encoder", "decoder") for i in (0, 1)]
    assert [unit.chained for unit in units] == [False, True, False, True]


def test_stages_of_blocks_are_taken_whole(units_of) -> None:
    units = units_of("swin")
    assert [unit.module for unit in units] == ["encoder.layers.0", "encoder.layers.1"]
    assert sum(len(group.layers) for group in units[0].groups) >= 12


def test_shared_blocks_are_calibrated_through_the_whole_model(units_of) -> None:
    units = units_of("albert")
    assert [unit.module for unit in units] == [""]
    assert {group.calls for group in units[0].groups} == {3}


class Mixer(nn.Module):
    """Blocks with a twist each: `twist` goes between two blocks or into the second's other arguments."""

    def __init__(self, twist: str) -> None:
        super().__init__()
        self.twist = twist
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x, torch.ones(()))
        scale = x.mean() if self.twist == "argument" else torch.ones(())
        if self.twist == "between":
            x = x * 2
        if self.twist == "in place":
            x.mul_(2)
        return self.head(self.layers[1](x, scale))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.inner(x) * scale


@pytest.mark.parametrize(
    ("twist", "chained"), [("none", True), ("between", False), ("in place", False), ("argument", False)]
)
def test_a_chain_is_only_seen_where_nothing_else_happens(twist: str, chained: bool) -> None:
    torch.manual_seed(0)
    units = find_units(Mixer(twist), ["layers.0.inner", "layers.1.inner", "head"], {"x": torch.randn(3, 8)})
    assert [unit.module for unit in units] == ["layers.0", "layers.1", ""]
    assert [unit.chained for unit in units] == [False, chained, False]


def test_the_outermost_list_item_is_the_block() -> None:
    model = nn.Module()
    model.stages = nn.ModuleList([nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])])
    model.flat = nn.ModuleList([nn.Linear(2, 2)])
    model.alone = nn.Linear(2, 2)
    assert find_block(model, "stages.0.0.0") == "stages.0.0"
    assert find_block(model, "flat.0") == "flat.0"
    assert find_block(model, "alone") is None
