"""The compiled kernels against float64: every structure, instruction set, dtype, side and awkward size."""

from __future__ import annotations

import weakref
from functools import partial
from itertools import product

import pytest
import torch
from padst_kernels.cpu import library, native, transient
from padst_kernels.cpu.isa import ISAS
from padst_kernels.cpu.library import TYPES
from padst_kernels.cpu.native import NativeKernel, kernel_name, serves, sparse_linear
from torch.autograd import forward_ad
from torch.nn import functional

CPU = torch.device("cpu")
SHAPES = [(64, 48), (48, 160), (100, 70), (33, 129), (7, 300), (300, 70), (96, 96), (131, 131)]
TOKENS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 65, 130, 517)
FAMILIES = {
    "diag": ("diag", {}),
    "band": ("diag", {"band": 16}),
    "1:10": ("nm", {"nm": (1, 10)}),
    "2:4": ("nm", {"nm": (2, 4)}),
    "3:15": ("nm", {"nm": (3, 15)}),
    "8:16": ("nm", {"nm": (8, 16)}),
    "1:20": ("nm", {"nm": (1, 20)}),
    "5:7": ("nm", {"nm": (5, 7)}),
    "block 16": ("block", {"block_size": 16}),
    "block 32": ("block", {"block_size": 32, "block_rows": "free"}),
    "block 64": ("block", {"block_size": 64}),
}


def fits(family: str, shape: tuple[int, int]) -> bool:
    structure, options = FAMILIES[family]
    return structure != "block" or min(shape) >= options["block_size"]


CASES = [(family, shape) for family in FAMILIES for shape in SHAPES if fits(family, shape)]


@pytest.fixture(autouse=True)
def _same_isa_afterwards():
    lib = library.library()
    before, threads = lib.padst_isa(), torch.get_num_threads()
    yield
    lib.padst_use_isa(before)
    torch.set_num_threads(threads)


@pytest.fixture(params=ISAS)
def isa(request):
    """Each instruction set that this machine can run."""
    if library.library().padst_use_isa(ISAS.index(request.param)):
        pytest.skip(f"this machine has no {request.param}")
    return request.param


def poisoned_call(kernel: NativeKernel, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The raw C call on an output full of NaN with guard rows around it, which must stay as they are."""
    room = torch.full((len(x) + 2, kernel.out_features), float("nan"), dtype=x.dtype)
    status = library.library().padst_forward(
        kernel.image.data_ptr(),
        x.data_ptr(),
        TYPES[x.dtype],
        None if bias is None else bias.data_ptr(),
        room[1].data_ptr(),
        len(x),
        torch.get_num_threads(),
    )
    assert status == 0
    assert bool(room[[0, -1]].isnan().all()), "wrote outside the output"
    return room[1:-1]


def close(found: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> None:
    expected = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[x.dtype]
    scale = float(expected.abs().max()) or 1.0
    assert float((found.double() - expected).abs().max()) <= tolerance * scale


@pytest.mark.parametrize(("family", "shape"), CASES)
def test_forward_equals_float64(make_case, isa, family, shape):
    structure, options = FAMILIES[family]
    out_features, in_features = shape
    for number, (value_dtype, sides) in enumerate(
        [(torch.float32, "i"), (torch.float32, "o"), (torch.bfloat16, "io"), (torch.float16, "i"), (torch.float32, "")]
    ):
        case = make_case(structure, out_features, in_features, 0.3, sides, value_dtype, **options)
        kernel = NativeKernel(case.layout)
        assert kernel.name == f"cpu-{isa}-{structure}"
        for tokens in TOKENS[number % 2 :: 2] if number else TOKENS:
            torch.set_num_threads(1 + tokens % 2)
            x = torch.randn(tokens, in_features)
            bias = torch.randn(out_features) if tokens % 3 else None
            close(poisoned_call(kernel, x, bias), case.weight, x, bias)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("sides", ["i", "io"])
@pytest.mark.parametrize("structure", ["diag", "nm", "block"])
def test_few_tokens_on_several_threads(make_case, structure, sides):
    """A layer large enough that a second and third thread are woken for one token."""
    case = make_case(structure, 700, 650, 0.4, sides)
    kernel = NativeKernel(case.layout)
    assert len(kernel.image) > 2 * (256 << 10)
    for threads, tokens in product((2, 3), (1, 2, 3, 4, 7)):
        torch.set_num_threads(threads)
        x, bias = torch.randn(tokens, 650), torch.randn(700)
        close(poisoned_call(kernel, x, bias), case.weight, x, bias)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("structure", ["diag", "nm", "block"])
def test_sixteen_bit_activations(make_case, structure, dtype):
    case = make_case(structure, 100, 70, 0.3, "io", dtype)
    kernel = NativeKernel(case.layout)
    for tokens in (1, 6, 40):
        x, bias = torch.randn(tokens, 70).to(dtype), torch.randn(100).to(dtype)
        close(poisoned_call(kernel, x, bias), case.weight, x, bias)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_sixteen_bit_number_passes_unchanged(make_case, dtype):
    # One diagonal of ones: what comes out went through the conversion to float32 and back, and nothing else.
    case = make_case("diag", 64, 64, 1 / 64)
    case.layout.tensors["values"].fill_(1.0)
    case.layout.tensors["offsets"].fill_(0)
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, 64)
    # A row with a NaN or an infinity is all NaN: zero weights are multiplied too.
    numbers = numbers[numbers.isfinite().all(dim=1)]
    for x in (numbers, numbers[:1]):
        assert torch.equal(poisoned_call(NativeKernel(case.layout), x.contiguous(), None), x)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_as_torch_rounds(make_case, dtype):
    case = make_case("diag", 64, 64, 1 / 64)
    case.layout.tensors["offsets"].fill_(0)
    # A 16-bit number times a float32 value: products that fall between two 16-bit numbers, some among the subnormals.
    values = case.layout.tensors["values"].copy_(torch.randn(1, 64) * torch.logspace(-9, 3, 64))
    x = torch.randn(200, 64).to(dtype)
    found = poisoned_call(NativeKernel(case.layout), x, None)
    assert torch.equal(found, (x.float() * values).to(dtype))


ACTIVATED = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("sides", ["", "i", "o", "io"])
@pytest.mark.parametrize("activation", ACTIVATED)
@pytest.mark.parametrize("structure", ["diag", "nm", "block"])
def test_outputs_may_end_in_an_activation(make_case, structure, activation, sides):
    case = make_case(structure, 100, 70, 0.3, sides)
    kernel = NativeKernel(case.layout)
    for tokens in (1, 3, 9, 33, 70):
        x, bias = 3 * torch.randn(tokens, 70), torch.randn(100) if tokens != 9 else None
        plain = functional.linear(x.double(), case.weight.double(), None if bias is None else bias.double())
        expected = ACTIVATED[activation](plain)
        found = kernel(x, bias, activation)
        assert float((found - expected).abs().max()) <= 1e-5 * float(plain.abs().max())
        close(kernel(x, bias), case.weight, x, bias)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("activation", ACTIVATED)
def test_an_activation_is_right_for_every_size_of_sum(make_case, activation):
    case = make_case("diag", 64, 64, 1 / 64)
    case.layout.tensors["values"].fill_(1.0)
    case.layout.tensors["offsets"].fill_(0)
    sizes = torch.cat([torch.linspace(-20, 20, 4000), torch.logspace(-30, 30, 4000), -torch.logspace(-30, 1.9, 4000)])
    x = functional.pad(sizes, (0, -len(sizes) % 64)).view(-1, 64)
    kernel = NativeKernel(case.layout)
    for rows in (x, x[:1], x[-1:]):
        found, expected = kernel(rows, None, activation).double(), ACTIVATED[activation](rows.double())
        assert bool(((found - expected).abs() <= 4e-7 * rows.abs().clamp(max=1) + 3e-7 * expected.abs()).all())
    assert bool(kernel(torch.full((1, 64), float("nan")), None, activation).isnan().all())


def test_gradients_and_dense_products_end_in_the_activation_too(make_case, monkeypatch):
    case = make_case("block", 64, 48, 0.3, "io")
    kernel, x = NativeKernel(case.layout), torch.randn(9, 48)
    expected = functional.silu(functional.linear(x, case.weight))
    found = kernel(x.requires_grad_(), None, "silu")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad(functional.silu(functional.linear(x, case.weight)).sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], wanted, rtol=1e-4, atol=1e-5)
    always_dense = transient.Limits(transient.work_of(kernel.image.data_ptr()))
    always_dense[torch.get_num_threads(), torch.float32] = 1
    monkeypatch.setattr(kernel, "_limits", always_dense)
    many = torch.randn(40, 48)
    assert kernel.name_at(40, torch.float32) == transient.NAME
    expected = functional.silu(functional.linear(many, case.weight))
    torch.testing.assert_close(kernel(many, None, "silu"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value_dtype", list(TYPES))
@pytest.mark.parametrize(("family", "shape"), CASES)
def test_the_image_gives_back_the_packed_tensors(make_case, family, shape, value_dtype):
    structure, options = FAMILIES[family]
    case = make_case(structure, *shape, 0.3, "io", value_dtype, **options)
    stored = {**case.layout.tensors, "perm_in": case.layout.perm_in, "perm_out": case.layout.perm_out}
    kernel = NativeKernel(case.layout)
    found = {key: torch.full_like(tensor, 77) for key, tensor in stored.items()}
    kernel.unpack(found)
    for key, tensor in stored.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("structure", "options", "bound"),
    [
        ("diag", {}, (1.15, 0)),
        ("nm", {"nm": (1, 10)}, (1.03, 4)),
        ("nm", {"nm": (2, 4)}, (1.03, 2)),
        ("block", {"block_size": 32}, (1.15, 0)),
    ],
)
@pytest.mark.parametrize("shape", [(2304, 768), (768, 768), (768, 3072)])
def test_images_stay_within_the_memory_bound(make_case, structure, options, bound, shape, value_dtype):
    side = "i" if structure == "nm" or shape[0] >= shape[1] else "o"
    case = make_case(structure, *shape, 0.1, side, value_dtype, **options)
    values = case.layout.density * shape[0] * shape[1] * value_dtype.itemsize
    factor, index_bits = bound
    allowed = factor + index_bits / (8 * value_dtype.itemsize)
    assert NativeKernel(case.layout).resident_bytes() <= allowed * values


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("structure", ["diag", "nm", "block"])
def test_missing_inputs_stay_where_they_are(make_case, structure):
    case = make_case(structure, 96, 64, 0.2, "i")
    x = torch.randn(5, 64)
    x[2] = float("nan")
    y = poisoned_call(NativeKernel(case.layout), x, None)
    assert bool(y[[0, 1, 3, 4]].isfinite().all())
    assert NativeKernel(case.layout)(torch.randn(2, 0, 64), None).shape == (2, 0, 96)


@pytest.mark.parametrize("structure", ["diag", "nm", "block"])
def test_calls_in_any_order_of_shapes_dtypes_and_threads(make_case, structure):
    """What a call keeps for the next one must not outlive what it depends on."""
    case = make_case(structure, 96, 64, 0.3, "io")
    kernel = NativeKernel(case.layout)
    bias = torch.randn(96)
    shapes = [(64,), (1, 64), (1, 1, 64), (2, 3, 64), (0, 64), (6, 64), (1, 64)]
    for threads, dtype in ((1, torch.float32), (2, torch.float32), (2, torch.bfloat16), (1, torch.float32)):
        torch.set_num_threads(threads)
        for shape in shapes:
            x = torch.randn(shape, dtype=dtype)
            for one in (bias, bias.to(dtype), bias.repeat_interleave(2)[::2], None):
                y = kernel(x, one)
                assert (y.dtype, y.shape, y.is_contiguous()) == (dtype, (*shape[:-1], 96), True)
                if y.numel():
                    close(y.view(-1, 96), case.weight, x.view(-1, 64), one)
    far = torch.randn(64, 6).T  # not contiguous, of a shape seen before
    close(kernel(far, None), case.weight, far, None)
    with pytest.raises(ValueError, match="63 features, the layer takes 64"):
        kernel(torch.randn(1, 63), None)


def test_a_call_holds_its_header_whatever_other_threads_call(make_case, monkeypatch):
    """C reads the header after the lock of the interpreter is gone, and another thread may replace what is kept."""
    headers = []

    def header(*fields):
        made = library.CallHeader(*fields)
        headers.append(weakref.ref(made))
        return made

    def run(*arguments):
        kernel._recent = native._NO_CALLS
        assert headers[-1]() is not None
        return real(*arguments)

    monkeypatch.setattr(native, "CallHeader", header)
    case = make_case("diag", 64, 48)
    kernel, x = NativeKernel(case.layout), torch.randn(3, 48)
    real, kernel._run = kernel._run, run
    close(kernel(x, None), case.weight, x, None)  # the header is new
    kernel._run = real
    kernel(x, None)
    kernel._run = run
    close(kernel(x, None), case.weight, x, None)  # the header is that of the call before
    assert [one() for one in headers] == [None, None]


@pytest.mark.parametrize("structure", ["diag", "nm", "block"])
def test_gradients_reach_input_and_bias(make_case, structure):
    case = make_case(structure, 70, 50, 0.4, "io")
    x = torch.randn(3, 50, requires_grad=True)
    bias = torch.randn(70, requires_grad=True)
    dy = torch.randn(3, 70)
    y = NativeKernel(case.layout)(x, bias)
    (y * dy).sum().backward()
    torch.testing.assert_close(x.grad, dy @ case.weight)
    torch.testing.assert_close(bias.grad, dy.sum(dim=0))


@pytest.mark.parametrize("activation", ["", "silu"])
@pytest.mark.parametrize("dual", ["x", "bias", "x bias"])
def test_tangents_of_input_and_bias_reach_the_output(make_case, dual, activation):
    case = make_case("diag", 70, 50, 0.4, "io")
    kernel = NativeKernel(case.layout)
    with forward_ad.dual_level():
        x, bias = (
            forward_ad.make_dual(torch.randn(shape), torch.randn(shape)) if name in dual.split() else torch.randn(shape)
            for name, shape in (("x", (3, 50)), ("bias", (70,)))
        )
        found, expected = kernel(x, bias, activation), functional.linear(x, case.weight, bias)
        expected = ACTIVATED[activation](expected) if activation else expected
        torch.testing.assert_close(found, expected)
        tangents = [forward_ad.unpack_dual(y).tangent for y in (found, expected)]
        torch.testing.assert_close(*tangents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("structure", ["diag", "nm", "block"])
def test_the_operator_is_the_kernel(make_case, structure):
    case = make_case(structure, 64, 48, 0.3, "io")
    kernel = NativeKernel(case.layout)
    x, bias = torch.randn(2, 3, 48), torch.randn(64)
    arguments = (x, kernel.image, bias, 64)
    assert torch.equal(sparse_linear(*arguments), kernel(x, bias))
    torch.library.opcheck(sparse_linear, arguments, test_utils=("test_schema", "test_faketensor"))


def test_what_the_kernels_do_not_serve():
    assert all(serves("diag", 768, CPU, values) for values in TYPES)
    assert not serves("unstructured", 768, CPU, torch.float32)
    assert not serves("diag", 1 << 17, CPU, torch.float32)
    assert not serves("diag", 768, torch.device("meta"), torch.float32)
    assert not serves("diag", 768, CPU, torch.float64)


def test_without_a_compiled_library_padst_says_so_and_goes_on(monkeypatch):
    monkeypatch.setattr(library, "find", lambda: None)
    library.library.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="without its compiled kernels"):
            assert not serves("diag", 768, CPU, torch.float32)
        assert library.library() is None
    finally:
        library.library.cache_clear()


def test_an_image_of_something_else_is_refused():
    junk = torch.zeros(4096, dtype=torch.uint8)
    x = torch.zeros(1, 8)
    assert library.library().padst_forward(junk.data_ptr(), x.data_ptr(), 0, None, x.data_ptr(), 1, 1) < 0


def test_names_say_instruction_set_and_structure():
    assert kernel_name("diag") == f"cpu-{ISAS[library.library().padst_isa()]}-diag"
