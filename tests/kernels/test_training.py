"""The training kernels against float64: product and every gradient, both layouts, all sides, awkward sizes."""

from __future__ import annotations

import pytest
import torch
from padst_kernels.cpu import library
from padst_kernels.cpu.isa import ISAS
from padst_kernels.cpu.training import TrainingKernel, pays, serves
from torch._subclasses.fake_tensor import FakeTensorMode

from padst_cli.permutation.apply import from_structure, random_permutation
from padst_cli.structures import StructureOptions, structure_class

SHAPES = [(64, 48), (48, 160), (100, 70), (33, 129), (70, 300), (300, 70), (97, 97)]
TOKENS = (1, 3, 8, 9, 63, 64, 65, 129, 300)
FAMILIES = {"diag": {}, "nm": {}, "block": {"block_size": 16}, "unstructured": {}}


@pytest.fixture(params=ISAS)
def isa(request):
    """Each instruction set that this machine can run."""
    lib = library.library()
    before = lib.padst_isa()
    if lib.padst_use_isa(ISAS.index(request.param)):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    lib.padst_use_isa(before)


def make(family, shape, sides="", density=0.2, **options):
    """A kernel, the weight that it multiplies by (poisoned outside the support), the mask and the permutations."""
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    options = StructureOptions(**{**FAMILIES[family], **options})
    structure = structure_class(family).for_density(*shape, density, options)
    weight = torch.randn(shape, generator=generator)
    mask = structure.project(weight.abs())
    perms = (
        random_permutation(shape[1], generator) if "i" in sides else None,
        random_permutation(shape[0], generator) if "o" in sides else None,
    )
    kernel = TrainingKernel(mask, *perms, structure.parameters().get("block_size"))
    return kernel, weight.masked_fill(~mask, float("nan")).requires_grad_(), mask, perms


def reference(weight, mask, perms, x, bias, dy):
    """y and the gradients of x, the weight's support and the bias in float64, by torch's own differentiation."""
    x, bias = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    clean = torch.where(mask, weight.detach().double(), 0.0).requires_grad_()
    y = torch.nn.functional.linear(x, from_structure(clean, *perms), bias)
    y.backward(dy.double())
    return y, x.grad, clean.grad, bias.grad


def close(found, expected):
    scale = float(expected.detach().abs().max()) or 1.0
    assert float((found.double() - expected).abs().max()) <= 1e-5 * scale


def check_product_and_gradients(kernel, weight, mask, perms, x, bias, dy):
    y = kernel(x, weight, bias)
    y.backward(dy)
    expected = reference(weight, mask, perms, x, bias, dy)
    close(y, expected[0])
    close(x.grad, expected[1])
    close(weight.grad, torch.where(mask, expected[2], 0.0))
    close(bias.grad, expected[3])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("sides", ["", "i", "o", "io"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_product_and_gradients_equal_float64(family, shape, sides):
    kernel, weight, mask, perms = make(family, shape, sides)
    bias = torch.randn(shape[0]).requires_grad_()
    for tokens in TOKENS:
        x, dy = torch.randn(tokens, shape[1]).requires_grad_(), torch.randn(tokens, shape[0])
        weight.grad = bias.grad = None
        check_product_and_gradients(kernel, weight, mask, perms, x, bias, dy)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_gradient_is_that_of_a_dense_weight(family):
    kernel, weight, mask, perms = make(family, (100, 70), "io")
    x, dy = torch.randn(17, 70), torch.randn(17, 100)
    kernel(x, weight, None, dense_gradient=True).backward(dy)
    close(weight.grad, reference(weight, mask, perms, x, torch.zeros(100), dy)[2])


@pytest.mark.parametrize("dense_gradient", [False, True])
def test_one_token_needs_no_further_dimension(dense_gradient):
    kernel, weight, mask, perms = make("diag", (100, 70), "io")
    x, dy, bias = torch.randn(70).requires_grad_(), torch.randn(100), torch.zeros(100).requires_grad_()
    y = kernel(x, weight, bias, dense_gradient)
    y.backward(dy)
    expected = reference(weight, mask, perms, x[None], torch.zeros(100), dy[None])
    close(y[None], expected[0])
    close(x.grad[None], expected[1])
    close(weight.grad, expected[2] if dense_gradient else torch.where(mask, expected[2], 0.0))
    close(bias.grad, dy)


@pytest.mark.parametrize("family", ["diag", "block"])
def test_values_follow_every_step_of_the_optimizer(family):
    kernel, weight, mask, perms = make(family, (64, 48), "i")
    x, dy = torch.randn(9, 48), torch.randn(9, 64)
    for _ in range(3):
        y = kernel(x, weight, None)
        close(y, reference(weight, mask, perms, x, torch.zeros(64), dy)[0])
        with torch.no_grad():
            weight.mul_(-1.7)


@pytest.mark.parametrize("family", ["diag", "block"])
def test_values_follow_changes_that_no_version_tells(family):
    kernel, weight, mask, _ = make(family, (64, 48))
    weight = torch.where(mask, weight.detach(), 0.0)
    x, dy = torch.randn(9, 48, requires_grad=True), torch.randn(9, 64)

    def follows(weight):
        y = kernel(x, weight, None)
        close(y, torch.nn.functional.linear(x.double(), weight.double()))
        (dx,) = torch.autograd.grad(y, x, dy)
        close(dx, dy.double() @ weight.double())

    follows(weight)
    weight.data.mul_(2)
    follows(weight)
    for factor in range(1, 6):  # each may be made where the one before was
        follows(weight * factor)
    with torch.inference_mode():
        other = weight * 3
        close(kernel(x, other, None), torch.nn.functional.linear(x.double(), other.double()))


def test_inputs_of_another_width_are_refused():
    kernel, weight, _, _ = make("diag", (64, 48))
    for width in (8, 49, 4800):
        with pytest.raises(ValueError, match=f"input has {width} features, the layer takes 48"):
            kernel(torch.randn(30, width), weight, None)


def test_threads_do_not_change_a_bit():
    kernel, weight, _, _ = make("nm", (300, 70), "io")
    x, dy, threads = torch.randn(300, 70), torch.randn(300, 300), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append((kernel.forward(x, weight.detach(), None), kernel.weight_gradient(x, dy)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_large_layers_pass_several_panels_and_groups():
    kernel, weight, mask, perms = make("diag", (600, 300), "o", density=0.1)
    x, dy = torch.randn(2, 65, 300).requires_grad_(), torch.randn(2, 65, 600)
    y = kernel(x, weight, None)
    y.backward(dy)
    flat = reference(weight, mask, perms, x.flatten(0, 1), torch.zeros(600), dy.flatten(0, 1))
    assert y.shape == (2, 65, 600)
    close(y.flatten(0, 1), flat[0])
    close(x.grad.flatten(0, 1), flat[1])
    close(weight.grad, torch.where(mask, flat[2], 0.0))


def test_empty_rows_give_zero():
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[3, 5] = True
    kernel = TrainingKernel(mask, None, None)
    weight = torch.full((40, 40), 2.0, requires_grad=True)
    x = torch.randn(11, 40)
    y = kernel(x, weight, None)
    assert torch.equal(y[:, 3], 2 * x[:, 5])
    assert not y[:, torch.arange(40) != 3].any()


@pytest.mark.parametrize("default", ["cpu", "meta"])
@pytest.mark.parametrize("family", ["diag", "block"])
def test_a_kernel_made_in_inference_mode_or_under_another_default_device_trains(family, default):
    _, weight, mask, perms = make(family, (64, 48), "io")
    x, dy, bias = torch.randn(9, 48).requires_grad_(), torch.randn(9, 64), torch.randn(64).requires_grad_()
    with torch.device(default), torch.inference_mode():
        kernel = TrainingKernel(mask, *perms, 16 if family == "block" else None)
        kernel(x, weight, None)
    with torch.no_grad():
        weight.mul_(2)
    check_product_and_gradients(kernel, weight, mask, perms, x, bias, dy)


def test_a_kernel_fits_only_what_it_was_made_for():
    kernel, _, mask, perms = make("block", (64, 48), "i")
    assert kernel.fits(mask, *perms)
    assert not kernel.fits(mask, None, None)
    assert not kernel.fits(mask.clone(), *perms)
    mask[0, 0] = ~mask[0, 0]
    assert not kernel.fits(mask, *perms)


def test_served_are_float32_products_on_the_cpu_outside_autocast():
    x, weight = torch.zeros(2, 8), torch.zeros(4, 8)
    assert serves(x, weight)
    assert not serves(x.double(), weight.double())
    assert not serves(x.bfloat16(), weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not serves(x, weight)


def test_what_is_more_than_its_memory_is_not_served():
    x, weight = torch.randn(64, 48), torch.randn(64, 48)
    assert serves(x, weight)
    assert not serves(torch._neg_view(x), weight)
    assert not serves(torch.nn.Parameter(x), weight)
    with FakeTensorMode() as mode:
        assert not serves(mode.from_tensor(x), weight)


def test_dense_layers_and_few_tokens_do_not_pay():
    assert pays(0.1, 2048, None)
    assert pays(0.5, 2048, 32)
    assert not pays(0.5, 2048, None)
    assert not pays(0.95, 1 << 20, 32)
    assert not pays(0.35, 64, None)
