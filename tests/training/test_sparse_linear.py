"""The layer that is trained: what it computes, what it never lets through, and how it hardens."""

import copy

import pytest
import torch
from padst_kernels.gpu import measured
from padst_kernels.gpu.measured import Measured

from padst_cli.permutation.apply import from_structure, random_permutation
from padst_cli.permutation.soft import balanced, matrix_of
from padst_cli.structures import StructureOptions, structure_class, structure_names
from padst_cli.training import sparse_linear
from padst_cli.training.permutation import Permutation
from padst_cli.training.sparse_linear import DENSE_PRODUCT, SparseLinear, sparse_layers
from padst_cli.training.swap import finished_layers
from tests.kernels.gpu_fakes import CUDA, gpu  # noqa: F401

OUT, IN = 48, 32


def make(name, sides=("input", "output"), mixing=None, bias=True):
    generator = torch.Generator().manual_seed(5)
    structure = structure_class(name).for_density(OUT, IN, 0.25, StructureOptions())
    dense = torch.randn(OUT, IN, generator=generator)
    mask = structure.project(dense.square())
    perms = {
        "input": Permutation(random_permutation(IN, generator), mixing=mixing) if "input" in sides else None,
        "output": Permutation(random_permutation(OUT, generator), mixing=mixing) if "output" in sides else None,
    }
    weight = torch.where(mask, dense, 0.0)
    offset = torch.randn(OUT, generator=generator) if bias else None
    return SparseLinear(structure, weight, mask, offset, perms["input"], perms["output"])


@pytest.mark.parametrize("sides", [(), ("input",), ("output",), ("input", "output")])
@pytest.mark.parametrize("name", structure_names())
def test_hard_layer_is_the_dense_layer_it_stands_for(name, sides):
    layer = make(name, sides)
    perms = {side: perm.index for side, perm in layer.permutations()}
    dense = from_structure(layer.weight, perms.get("input"), perms.get("output"))
    x = torch.randn(3, 5, IN)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, dense, layer.bias))


@pytest.mark.parametrize("sides", [("input",), ("output",), ("input", "output")])
def test_soft_layer_at_a_corner_of_the_polytope_is_the_hard_layer(sides):
    soft, hard = make("diag", sides, mixing=0.0), make("diag", sides)
    x = torch.randn(4, IN)
    torch.testing.assert_close(soft(x), hard(x), rtol=0, atol=5e-3)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("mixing", [None, 0.3])
def test_what_lies_outside_the_mask_never_leaks(poison, mixing):
    layer = make("diag", mixing=mixing)
    x = torch.randn(4, IN)
    clean = layer(x)
    with torch.no_grad():
        layer.weight.masked_fill_(~layer.mask, poison)
    torch.testing.assert_close(layer(x), clean, rtol=0, atol=0)
    layer(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


@pytest.mark.parametrize("sides", [("input",), ("input", "output")])
@pytest.mark.parametrize("mixing", [None, 0.3])
@pytest.mark.parametrize("name", structure_names())
def test_compiled_product_equals_the_dense_one(name, mixing, sides):
    layer, tokens = make(name, sides, mixing=mixing), 600
    layer.dense_gradient = False
    double = copy.deepcopy(layer).double()
    x = torch.randn(2, tokens // 2, IN)
    found, expected = layer(x), double(x.double())
    dy = torch.randn(found.shape)
    found.backward(dy)
    expected.backward(dy.double())
    assert layer.computed_by.endswith("-block" if name == "block" else "-rows")
    assert double.computed_by == DENSE_PRODUCT
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    for one, other in zip(layer.parameters(), double.parameters(), strict=True):
        wanted = torch.where(layer.mask, other.grad, 0.0) if one is layer.weight else other.grad
        torch.testing.assert_close(one.grad.double(), wanted, rtol=1e-3, atol=1e-3)


def test_the_kernel_follows_support_and_permutation():
    layer = make("diag", ("input",))
    layer.dense_gradient = False
    x = torch.randn(600, IN)
    layer(x)
    with torch.no_grad():
        layer.mask.copy_(layer.mask.roll(1, 0))
        layer.weight.normal_()
    layer.perm_in.harden(layer.perm_in.index.flip(0))
    dense = from_structure(torch.where(layer.mask, layer.weight, 0.0), layer.perm_in.index, None)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, dense, layer.bias), rtol=1e-4, atol=1e-4)
    assert layer.computed_by.endswith("-rows")


def test_a_support_wider_than_the_structure_is_not_packed_for_a_gpu(monkeypatch):
    layer = make("diag")
    monkeypatch.setattr(sparse_linear, "serves", lambda *_: False)
    monkeypatch.setattr(sparse_linear.gpu, "trains", lambda *_: True)
    monkeypatch.setattr(sparse_linear.gpu, "training_pays", lambda *_: True)
    assert layer._pays_on_gpu(torch.device("cpu"), torch.float32, 2)
    layer.mask.fill_(True)
    layer(torch.randn(2, IN))
    assert layer.computed_by == DENSE_PRODUCT


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("ruled", [False, True])
def test_a_gpu_s_figures_overrule_the_rules_as_far_as_they_go(monkeypatch, ruled):
    monkeypatch.setattr(sparse_linear.gpu, "training_pays", lambda *_: ruled)
    bf16, layers = torch.bfloat16, [make("block"), make("block", ("input",))]
    name = layers[0].gpu_signature(bf16)
    assert name != layers[1].gpu_signature(bf16)
    quick, slow = ({"torch-dense": 1.0, "cuda-triton-block": seconds} for seconds in (0.5, 2.0))
    measured.keep(CUDA, Measured(paths={name: {128: slow, 4096: quick}}))
    tokens = (1, 128, 129, 4096, 4097)
    assert [layers[0]._pays_on_gpu(CUDA, bf16, count) for count in tokens] == [False, False, True, True, ruled]
    assert [layers[0]._pays_on_gpu(CUDA, torch.float16, count) for count in tokens] == [ruled] * 5
    assert [layers[1]._pays_on_gpu(CUDA, bf16, count) for count in tokens] == [ruled] * 5


def test_few_tokens_run_as_a_dense_product_and_say_so():
    layer = make("diag")
    layer(torch.randn(2, IN))
    assert layer.computed_by == DENSE_PRODUCT


def test_gradient_of_the_weight_is_that_of_the_dense_matrix():
    layer = make("block", ())
    x = torch.randn(6, IN)
    layer(x).square().sum().backward()
    dense = layer.weight.detach().clone().requires_grad_()
    torch.nn.functional.linear(x, dense, layer.bias).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, dense.grad)
    assert (layer.weight.grad[~layer.mask] != 0).any()


@pytest.mark.parametrize("side", ["input", "output"])
def test_gradient_of_the_soft_matrix_against_the_plain_formula(side):
    layer = make("diag", (side,), mixing=0.3)
    x = torch.randn(6, IN)
    layer(x).square().sum().backward()
    perm = getattr(layer, "perm_in" if side == "input" else "perm_out")
    reference = perm.log_matrix.detach().clone().requires_grad_()
    weight, matrix = layer.weight.detach(), balanced(reference)
    dense = weight @ matrix if side == "input" else matrix @ weight
    torch.nn.functional.linear(x, dense, layer.bias.detach()).square().sum().backward()
    torch.testing.assert_close(perm.log_matrix.grad, reference.grad, rtol=1e-4, atol=1e-3)


def test_hardening_keeps_an_index_and_counts_what_moved():
    perm = Permutation(random_permutation(16, torch.Generator().manual_seed(0)), mixing=0.2)
    assert perm.is_soft
    assert perm.moved == 0
    swapped = perm.start.clone()
    swapped[[2, 9]] = swapped[[9, 2]]
    with torch.no_grad():
        perm.log_matrix.copy_((0.8 * matrix_of(swapped) + 0.2 / 16).log())
    perm.harden(perm.rounded())
    assert not perm.is_soft
    assert perm.moved == 2
    assert list(perm.parameters()) == []
    x = torch.randn(3, 16)
    assert torch.equal(perm(x), x[:, swapped.long()])


def test_sparsify_modules_swaps_what_is_planned_and_nothing_else(bench):
    recipe = bench.recipe()
    _, student = bench.student(recipe)
    layers = sparse_layers(student)
    assert len(layers) == 8
    assert student.lm_head.weight is student.transformer.wte.weight
    for layer in layers.values():
        assert [side for side, _ in layer.permutations()] == ["input", "output"]
        smaller = "input" if layer.out_features >= layer.in_features else "output"
        assert [side for side, perm in layer.permutations() if perm.is_soft] == [smaller]
    assert {side for layer in layers.values() for side, perm in layer.permutations() if perm.is_soft} == {
        "input",
        "output",
    }
    hard = bench.student(bench.recipe(**{"permutation.kind": "assignment"}))[1]
    assert not any(perm.is_soft for layer in sparse_layers(hard).values() for _, perm in layer.permutations())
    bare = bench.student(bench.recipe(**{"permutation.kind": "none"}))[1]
    assert not any(list(layer.permutations()) for layer in sparse_layers(bare).values())


def test_both_sides_of_a_layer_are_learned_where_the_plan_says_so(bench):
    recipe = bench.recipe(**{"permutation.side": "both"})
    student, result = bench.train(recipe)
    assert result.permutations["learned"] == 16
    assert result.permutations["learned_before_training"] == 0
    for layer in sparse_layers(student).values():
        assert [side for side, _ in layer.permutations()] == ["input", "output"]


def test_finished_layers_rebuild_the_trained_model(bench):
    student, _ = bench.train(bench.recipe())
    ids = bench.dataset[0]["input_ids"][None]
    dense = bench.teacher()
    finished = finished_layers(student)
    others = {key: value for key, value in student.state_dict().items() if key.rpartition(".")[0] not in finished}
    dense.load_state_dict(others, strict=False)
    for name, state in finished.items():
        assert state.structure.is_feasible(state.structure.units_of(state.mask))
        assert not state.weight[~state.mask].any()
        with torch.no_grad():
            dense.get_submodule(name).weight.copy_(from_structure(state.weight, state.perm_in, state.perm_out).T)
            dense.get_submodule(name).bias.copy_(state.bias)
    torch.testing.assert_close(dense(ids).logits, student(ids).logits, rtol=1e-4, atol=1e-5)
