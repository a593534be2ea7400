"""AdamW in one pass: the steps of torch's own, seen by version counters."""

import pytest
import torch
from torch import nn

from padst_cli.training.optimizer import AdamW


def stepped(make, weight, gradients):
    parameter = nn.Parameter(weight.clone())
    optimizer = make([{"params": [parameter]}], lr=0.1, weight_decay=0.01)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter


@pytest.mark.parametrize("transposed", [False, True])
def test_it_steps_as_torch_does_whatever_the_layout(transposed):
    weight = torch.randn(5, 7).T if transposed else torch.randn(7, 5)
    gradients = [torch.randn(7, 5) for _ in range(3)]
    found, expected = (stepped(make, weight, gradients) for make in (AdamW, torch.optim.AdamW))
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, weight, atol=0.1)


def test_a_step_counts_as_a_change_of_what_had_a_gradient():
    moved, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = AdamW([{"params": [moved]}, {"params": [idle], "weight_decay": 0.0}], 0.1)
    assert optimizer.param_groups[0]["fused"]
    moved.grad = torch.ones(3)
    before = moved._version, idle._version
    optimizer.step()
    assert moved._version > before[0]
    assert idle._version == before[1]
