"""Layers for the tests of the Triton kernels, and what they must compute."""

from __future__ import annotations

import torch
from padst_kernels.gpu.layer import OPERATORS, TritonKernel
from torch.autograd import forward_ad
from torch.nn import functional

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
TOKENS = (1, 3, 16, 17, 65)
SIDES = ("", "i", "o", "io")
FAMILIES = {
    "diag": ("diag", {}),
    "band 16": ("diag", {"band": 16}),
    "band 32": ("diag", {"band": 32}),
    "band 64": ("diag", {"band": 64}),
    "1:2": ("nm", {"nm": (1, 2)}),
    "2:4": ("nm", {"nm": (2, 4)}),
    "1:10": ("nm", {"nm": (1, 10)}),
    "3:15": ("nm", {"nm": (3, 15)}),
    "8:16": ("nm", {"nm": (8, 16)}),
    "1:20": ("nm", {"nm": (1, 20)}),
    "block 16": ("block", {"block_size": 16}),
    "block 32": ("block", {"block_size": 32, "block_rows": "free"}),
    "block 64": ("block", {"block_size": 64}),
}

REFERENCE = {
    "": lambda z: z,
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "silu": functional.silu,
}


def close(found, weight, x, bias, slack=1.0):
    """`found` is W x + b, compared in float64 and measured against the largest output; W is rounded to x's dtype."""
    biases = None if bias is None else bias.to(x.dtype).double()
    expected = functional.linear(x.detach().double(), weight.to(x.dtype).double(), biases)
    assert found.shape == expected.shape
    assert found.dtype is x.dtype
    scale = float(expected.abs().max()) or 1.0
    assert float((found.detach().double() - expected).abs().max()) <= slack * TOLERANCE[x.dtype] * scale


def on(case, device):
    """The case's layout moved to a device."""
    layout = case.layout
    layout.tensors = {key: tensor.to(device) for key, tensor in layout.tensors.items()}
    layout.perm_in = None if layout.perm_in is None else layout.perm_in.to(device)
    layout.perm_out = None if layout.perm_out is None else layout.perm_out.to(device)
    weight = layout.materialise().to(device)
    layout.materialise = lambda: weight
    return layout


def check_forward(make_case, family, shape, device, tokens=TOKENS, turn=0):
    """Every count of tokens, with dtypes, sides and a bias in turn; `turn` is where to begin."""
    structure, options = FAMILIES[family]
    for number, count in enumerate(tokens, start=turn):
        dtype = DTYPES[number % 3]
        case = make_case(structure, *shape, 0.2, SIDES[number % 4], dtype, **options)
        kernel = TritonKernel(on(case, device))
        bias = torch.randn(shape[0], device=device) if number % 2 == 0 else None
        x = torch.randn(count, shape[1], device=device).to(dtype)
        close(kernel(x, bias), case.weight.to(device), x, bias)


def check_gradients(make_case, family, shape, device, tokens=(2, 3), activation="", sides="io"):
    """Gradients of x, the bias and the packed values, float32, against those of the dense formula."""
    structure, options = FAMILIES[family]
    case = make_case(structure, *shape, 0.3, sides, **options)
    operator, (values, *packed) = OPERATORS[structure][0], TritonKernel(on(case, device))._packed
    leaves = [
        torch.randn(*tokens, shape[1], device=device),
        torch.randn(shape[0], device=device),
        values,
        case.weight.to(device).clone(),
    ]
    x, bias, values, weight = (leaf.clone().requires_grad_() for leaf in leaves)
    dy = torch.randn(*tokens, shape[0], device=device)
    found = torch.autograd.grad(operator(x, bias, values, *packed, activation), (x, bias, values), dy)
    expected = torch.autograd.grad(REFERENCE[activation](functional.linear(x, weight, bias)), (x, bias, weight), dy)
    for one, other in zip(found, (*expected[:2], case.values_of(expected[2].cpu()).to(device)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=3e-5 * float(other.abs().max()))


def check_transforms(make_case, family, shape, device):
    """What torch.func's transforms find of a layer that ends in SiLU, and a tangent, against the dense formula."""
    structure, options = FAMILIES[family]
    case = make_case(structure, *shape, 0.3, "io", **options)
    kernel, weight = TritonKernel(on(case, device)), case.weight.to(device)
    x, bias = torch.randn(3, shape[1], device=device), torch.randn(shape[0], device=device)
    for find in (
        torch.func.vmap,
        lambda of: torch.func.grad(lambda u: of(u).square().sum()),
        lambda of: torch.func.vmap(torch.func.jacfwd(of)),
        lambda of: lambda u: torch.func.jvp(of, (u,), (u,))[1],
        torch.func.functionalize,
        lambda of: lambda u: of(torch._neg_view(u)),
    ):
        found = find(lambda u: kernel(u, bias, "silu"))(x)
        expected = find(lambda u: functional.silu(functional.linear(u, weight, bias)))(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with forward_ad.dual_level():
        y = kernel(forward_ad.make_dual(x, 2 * x), bias)
        close(forward_ad.unpack_dual(y).tangent, weight, 2 * x, None)
