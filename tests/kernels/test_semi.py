"""2:4 layers through torch's product: all around the product itself, which needs a GPU."""

from __future__ import annotations

import pytest
import torch
from padst_kernels.gpu import semi
from padst_kernels.gpu.semi import SemiStructured, Unavailable
from torch.nn import functional

BF16 = torch.bfloat16


class Plain:
    """A backend that keeps the dense weight."""

    @staticmethod
    def from_dense(weight):
        return type("Compressed", (), {"packed": weight.clone(), "meta": None})


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(semi, "_backends", lambda: {"plain": Plain})
    monkeypatch.setattr(semi, "_product", lambda rows, bias, packed, *_: functional.linear(rows, packed, bias))


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("sides", ["", "i", "o", "io"])
@pytest.mark.parametrize("biased", [True, False])
def test_equals_the_dense_product(make_case, sides, biased):
    case = make_case("nm", 64, 48, 0.5, sides, torch.float16, nm=(2, 4))
    kernel = SemiStructured(case.layout)
    x, bias = torch.randn(2, 3, 48, dtype=torch.float16), torch.randn(64) if biased else None
    y = kernel(x, bias)
    expected = functional.linear(x.double(), case.weight.double(), None if bias is None else bias.half().double())
    assert (y.shape, y.dtype) == ((2, 3, 64), torch.float16)
    assert float((y.double() - expected).abs().max()) < 2e-2
    assert kernel(x[:0], bias).shape == (0, 3, 64)
    assert kernel.resident_bytes() == 64 * 48 * 2


@pytest.mark.usefixtures("plain")
def test_what_is_compressed_is_two_of_four(make_case):
    case = make_case("nm", 64, 48, 0.5, "io", BF16, nm=(2, 4))
    kernel = SemiStructured(case.layout)
    kernel.prepare(BF16)
    groups = (kernel._weight[1] != 0).view(64, 12, 4).sum(dim=2)
    assert int(groups.max()) == 2


@pytest.mark.usefixtures("plain")
def test_gradients_reach_the_input_and_the_bias(make_case):
    case = make_case("nm", 64, 48, 0.5, "io", BF16, nm=(2, 4))
    x, bias = torch.randn(5, 48, dtype=BF16, requires_grad=True), torch.randn(64, dtype=BF16, requires_grad=True)
    dy = torch.randn(5, 64, dtype=BF16)
    (SemiStructured(case.layout)(x, bias) * dy).sum().backward()
    torch.testing.assert_close(x.grad, dy @ case.weight.to(BF16), rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(bias.grad, dy.sum(dim=0), rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("plain")
def test_one_operator_in_a_graph(make_case):
    case = make_case("nm", 64, 48, 0.5, "i", BF16, nm=(2, 4))
    kernel = SemiStructured(case.layout)
    kernel.prepare(BF16)
    x, (_, packed, meta) = torch.randn(5, 48, dtype=BF16), kernel._weight
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(semi.semi_linear, (x, None, packed, meta, "plain", 64), test_utils=checks)
    compiled = torch.compile(lambda x: kernel(x, None), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), kernel(x, None))


def test_without_a_gpu_torch_says_why(make_case):
    kernel = SemiStructured(make_case("nm", 64, 48, 0.5, "i", BF16, nm=(2, 4)).layout)
    with pytest.raises(Unavailable, match=r"cusparselt: .*cutlass: "):
        kernel.prepare(BF16)
    with pytest.raises(Unavailable, match="16 bits"):
        kernel.prepare(torch.float32)


def test_the_second_backend_serves_where_the_first_does_not(monkeypatch):
    class Missing:
        @staticmethod
        def from_dense(_):
            raise RuntimeError("not compiled\nand more")

    monkeypatch.setattr(semi, "_backends", lambda: {"missing": Missing, "plain": Plain})
    monkeypatch.setattr(semi, "_product", lambda rows, *_: rows)
    assert semi.compressed(torch.ones(4, 4, dtype=BF16))[0] == "plain"
    monkeypatch.setattr(semi, "_backends", lambda: {"missing": Missing})
    with pytest.raises(Unavailable, match=r"^missing: not compiled$"):
        semi.compressed(torch.ones(4, 4, dtype=BF16))


def test_only_two_of_four(make_case):
    assert semi.applies(make_case("nm", 64, 48, 0.5, nm=(2, 4)).layout)
    for structure, options in (("nm", {"nm": (1, 2)}), ("nm", {"nm": (4, 8)}), ("diag", {}), ("block", {})):
        assert not semi.applies(make_case(structure, 64, 48, 0.5, **options).layout)
