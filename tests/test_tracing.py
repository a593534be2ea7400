"""Who reads whose input, told by one pass on the meta device."""

import re

import pytest
import torch
import transformers
from torch import nn

from padst_cli.errors import PadstError
from padst_cli.tracing import example_inputs, layers_by_input
from tests import models

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GROUPS = [
    ("llama", [QKV, ("mlp.gate_proj", "mlp.up_proj")]),
    ("qwen3", [QKV, ("mlp.gate_proj", "mlp.up_proj")]),
    ("opt", [QKV]),
    ("bert", [("attention.self.query", "attention.self.key", "attention.self.value")]),
    ("vit", [("attention.q_proj", "attention.k_proj", "attention.v_proj")]),
    ("gpt2", []),
    ("gpt-neox", []),
]


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize(("family", "expected"), GROUPS)
def test_groups_of_every_family(family, expected, device):
    with torch.device(device):
        model = models.build(family)
    layers = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    groups = layers_by_input(model, layers, example_inputs(model))
    endings = [tuple(re.split(r"\.\d+\.", f".{name}")[1] for name in group) for group in groups]
    assert endings[: len(expected)] == expected
    assert len(groups) == 2 * len(expected)


def test_left_out_layers_are_not_seen():
    model = models.build("llama")
    layers = [f"model.layers.0.self_attn.{part}_proj" for part in "qvo"]
    assert layers_by_input(model, layers, example_inputs(model)) == [layers[:2]]


class Twice(nn.Module):
    """Reads one tensor with two layers, of which the second runs twice."""

    main_input_name = "input_ids"

    def __init__(self):
        super().__init__()
        self.config = None
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids):
        x = input_ids.float()
        return self.one(x) + self.two(x) + self.two(2 * x)


def test_a_layer_that_runs_twice_shares_nothing():
    assert layers_by_input(Twice(), ["one", "two"], example_inputs(Twice())) == []


def test_a_pass_that_needs_values_is_refused():
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, num_local_experts=4, experts_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config).eval()
    with pytest.raises(PadstError, match="MixtralForCausalLM read the same input cannot be told without its weights"):
        layers_by_input(model, ["model.layers.0.self_attn.q_proj"], example_inputs(model))
