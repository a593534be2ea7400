"""The Triton kernels without a GPU, under Triton's interpreter, against float64: structures, dtypes, sides, odd sizes.

Triton looks at TRITON_INTERPRET when a kernel is defined, so the tests run in a process of their own, which the last
test starts.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU = torch.device("cpu")
SHAPES = {
    "diag": [(70, 40), (33, 65), (100, 70), (40, 150), (150, 20), (48, 48)],
    "nm": [(9, 61), (6, 129), (8, 48)],
    "block": [(100, 70), (33, 129), (64, 64), (70, 200)],
}

if INTERPRETED:
    from padst_kernels.gpu import calibrate, diag, layer, measured, operator, permute, rules, tuning
    from triton.runtime import interpreter

    from tests.kernels.gpu_cases import (
        DTYPES,
        FAMILIES,
        REFERENCE,
        SIDES,
        TOKENS,
        check_forward,
        check_gradients,
        check_transforms,
        close,
        on,
    )
    from tests.kernels.gpu_fakes import CUDA, Clock, gpu  # noqa: F401

    CASES = [
        pytest.param(family, shape, TOKENS if turn == 0 else (3, 17), turn, marks=[pytest.mark.slow] if turn else [])
        for family, (structure, options) in FAMILIES.items()
        for turn, shape in enumerate(SHAPES[structure])
        if min(shape) >= options.get("block_size", 0) and max(shape) >= options.get("band", 0)
    ]
    ONE_EACH = [
        (family, {"block": (100, 70), "diag": (33, 65), "nm": (9, 61)}[structure])
        for family, (structure, _) in FAMILIES.items()
    ]

    def poisoned(make):
        """What `make` returns, NaN all over where it can be: an entry that no kernel writes is seen."""

        def made(*args, **options):
            tensor = make(*args, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    @pytest.fixture(autouse=True)
    def _poisoned_outputs(monkeypatch):
        monkeypatch.setattr(operator, "empty_output", poisoned(operator.empty_output))
        for name in ("empty", "empty_like"):
            monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))

    @pytest.fixture(autouse=True)
    def _products_of_bfloat16(monkeypatch):
        """The interpreter keeps bfloat16 as raw bits and multiplies these in a dot; float32 holds the same products."""
        dot = interpreter.InterpreterBuilder.create_dot

        def widened(self, a, b, *rest):
            wide = [self.cast_impl(each, triton_float32) if each.dtype.scalar.is_bf16() else each for each in (a, b)]
            return dot(self, *wide, *rest)

        triton_float32 = interpreter.tl.float32
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", widened)

    @pytest.mark.parametrize(("family", "shape", "tokens", "turn"), CASES)
    def test_forward_equals_float64(make_case, family, shape, tokens, turn):
        check_forward(make_case, family, shape, CPU, tokens, turn)

    @pytest.mark.parametrize(("family", "shape"), ONE_EACH)
    def test_gradients_equal_the_dense_ones(make_case, monkeypatch, family, shape):
        check_gradients(make_case, family, shape, CPU)
        monkeypatch.setattr(permute, "WORTH", 0)
        check_gradients(make_case, family, shape if FAMILIES[family][0] == "nm" else shape[::-1], CPU, (19,))

    @pytest.mark.parametrize("family", ["diag", "band 16", pytest.param("band 32", marks=pytest.mark.slow)])
    @pytest.mark.parametrize("shape", [(48, 48), (49, 47), (47, 49), (33, 90)], ids=str)
    def test_gradients_of_diagonals_that_wrap_around(make_case, family, shape):
        check_gradients(make_case, family, shape, CPU, (17,), sides="")

    def test_gradients_of_parts_are_added_up(make_case):
        for family, shape in (("block 16", (48, 33)), ("band 16", (33, 48)), ("2:4", (48, 33))):
            check_gradients(make_case, family, shape, CPU, (515,))

    @pytest.mark.parametrize(("tokens", "activation"), [(1, "gelu"), (7, "gelu_tanh"), (17, "silu")])
    @pytest.mark.parametrize("family", ["diag", "band 16", "3:15", "block 16"])
    def test_an_activation_in_the_epilogue(make_case, family, tokens, activation):
        check_gradients(make_case, family, (40, 50), CPU, (tokens,), activation)

    def test_permutations_in_passes_of_their_own(make_case, monkeypatch):
        for number, (family, shape) in enumerate(ONE_EACH):
            dtype, (structure, options) = DTYPES[number % 3], FAMILIES[family]
            case = make_case(structure, *shape, 0.3, "io", dtype, **options)
            x, bias = torch.randn(19, shape[1]).to(dtype), torch.randn(shape[0])
            within = layer.TritonKernel(case.layout)(x, bias)
            with monkeypatch.context() as patch:
                patch.setattr(permute, "WORTH", 0)
                assert torch.equal(layer.TritonKernel(case.layout)(x, bias), within)

    def test_torch_jit_records_the_operator(make_case):
        for family, shape in ONE_EACH:
            structure, options = FAMILIES[family]
            case = make_case(structure, *shape, 0.3, "io", **options)
            kernel, bias = layer.TritonKernel(case.layout), torch.randn(shape[0])
            traced = torch.jit.trace(lambda x, of=kernel, b=bias: of(x, b), torch.randn(3, shape[1]), check_trace=False)
            assert f"padst::triton_{structure}" in str(traced.graph)
            for tokens in (3, 20):
                x = torch.randn(tokens, shape[1])
                close(traced(x), case.weight, x, bias)

    @pytest.mark.parametrize(("family", "shape"), ONE_EACH)
    def test_transforms_and_tangents_pass_through(make_case, family, shape):
        check_transforms(make_case, family, shape, CPU)

    def test_what_is_not_where_x_is_or_does_not_fit_is_refused(make_case):
        for family, shape in ONE_EACH:
            structure, options = FAMILIES[family]
            case, x = make_case(structure, *shape, 0.3, "", **options), torch.randn(3, shape[1])
            kernel = layer.TritonKernel(case.layout)
            product, gradient = layer.OPERATORS[structure]
            values, index, _, _, _, parameters, _ = kernel._packed
            with pytest.raises(ValueError, match=r"x is on cpu, but .* on meta"):
                kernel(x, torch.empty(shape[0], device="meta"))
            with pytest.raises(ValueError, match=r"x is on meta, but .* on cpu"):
                product(x.to("meta"), None, values, *kernel._packed[1:], "")
            with pytest.raises(ValueError, match="on meta"):
                gradient(x, torch.empty(3, shape[0], device="meta"), values, index, None, None, parameters)
            with pytest.raises(ValueError, match=rf"bias is \[1\], the layer has {shape[0]} outputs"):
                kernel(x, torch.ones(1))

    TALL = [(48, 48), (64, 48), (104, 40), (72, 8), (200, 160), (47, 40), (56, 47)]
    WIDE = [(48, 64), (40, 104), (8, 72), (160, 200), (40, 47), (47, 56)]

    @pytest.fixture
    def by_classes(monkeypatch):
        """Whether each product with one token by classes of diagonals, from now on, was of the tall form."""
        forms, launch = [], diag._launch_one
        monkeypatch.setattr(permute, "WORTH", 0)
        monkeypatch.setattr(diag, "_launch_one", lambda *rest: (forms.append(rest[-2]), launch(*rest)))
        return forms

    @pytest.mark.parametrize("shape", TALL + WIDE, ids=str)
    @pytest.mark.parametrize("density", [0.01, 0.1, 0.6, 1.0])
    def test_one_token_by_classes_of_diagonals(make_case, by_classes, shape, density):
        """Where sizes allow it, and the same by the kernel for any."""
        for turn, sides in enumerate(SIDES):
            dtype = DTYPES[turn % 3]
            case = make_case("diag", *shape, density, sides, dtype)
            x, bias = torch.randn(1, shape[1]).to(dtype), torch.randn(shape[0])
            close(layer.TritonKernel(case.layout)(x, bias), case.weight, x, bias)
        assert by_classes == ([shape in TALL] * 4 if all(size % 8 == 0 for size in shape) else [])

    @pytest.mark.parametrize("shape", [(48, 48), (104, 40), (40, 104)], ids=str)
    @pytest.mark.parametrize("family", ["diag", "band 16"])
    def test_gradients_of_one_token_by_classes_of_diagonals(make_case, by_classes, family, shape):
        """That of the input is a product with the transpose, in the other form."""
        check_gradients(make_case, family, shape, CPU, (1,), "silu")
        tall = shape in TALL
        assert by_classes == [tall, tall, not tall]  # the product, once more for its activation's gradient, that of x

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("outputs", [11008, 4096, 768])
    def test_every_cut_for_one_token_out_of_shifted_copies(make_case, monkeypatch, by_classes, outputs, dtype):
        monkeypatch.setattr(diag, "one_space", lambda _, tall, space=diag.one_space: space(outputs, tall))
        case = make_case("diag", 72, 136, 0.4, "io", dtype)
        kernel, x, bias = layer.TritonKernel(case.layout), torch.randn(1, 136).to(dtype), torch.randn(72)
        with tuning._trying() as trial:
            kernel(x, bias)
            ((place, space),) = trial.spaces.items()
            for cut in space:
                trial.forced = {place: cut}
                close(kernel(x, bias), case.weight, x, bias)
        assert by_classes == [False] * 5

    @pytest.mark.parametrize("family", ["diag", "1:10"])
    def test_every_cut_for_few_tokens(make_case, monkeypatch, family):
        monkeypatch.setattr(permute, "WORTH", 0)
        structure, options = FAMILIES[family]
        case = make_case(structure, 72, 40, 0.3, "io", **options)
        kernel = layer.TritonKernel(case.layout)
        for tokens in (1, 2, 4, 7, 18):
            x = torch.randn(tokens, 40)
            with tuning._trying() as trial:
                kernel(x, None)
                assert trial.spaces
                for place, space in list(trial.spaces.items()):
                    for cut in space:
                        trial.forced = {place: cut}
                        close(kernel(x, None), case.weight, x, None)

    def test_diagonals_by_class():
        offsets = torch.tensor([0, 3, 8, 11, 15, 16, 91], dtype=torch.int32)
        numbers, starts = diag.classes_of(offsets, 96, 40)
        assert numbers.shape == starts.shape == (8, 32)
        met = starts < 96
        assert met.sum(dim=1).tolist() == [3, 0, 0, 3, 0, 0, 0, 1]
        assert torch.equal(starts[met], offsets[numbers[met].long()])
        assert sorted(numbers[met].tolist()) == list(range(7))
        assert (starts[met].reshape(-1) % 8).tolist() == [0, 0, 0, 3, 3, 3, 7]

    @pytest.mark.parametrize(("outputs", "inputs"), [(112, 96), (320, 320), (8, 8), (1024, 40)])
    def test_what_is_promised_of_addresses_is_true_of_all_that_are_read(outputs, inputs):
        """Hardware stops at a vector that begins elsewhere; the interpreter would not see it."""
        offsets = torch.randperm(outputs)[: outputs // 3].sort().values.to(torch.int32)
        starts = diag.classes_of(offsets, outputs, inputs)[1]
        assert torch.equal(starts % 8, torch.arange(8)[:, None].expand_as(starts))
        for rows in {cut.ROWS for size in (768, 4096, 11008) for cut in diag.one_space(size, True)}:
            for first in range(0, outputs, rows - 8):
                column = (first - 8 + torch.arange(8)[:, None] - starts)[:, :, None] + torch.arange(rows)
                column = torch.where(column < 0, column + outputs, column)
                live = ((column >= 0) & (column < inputs)).unflatten(2, (-1, 8))
                assert not (live.any(dim=3) & (column.unflatten(2, (-1, 8))[..., 0] % 8 != 0)).any()
                assert not live[starts >= outputs].any()

    @pytest.mark.parametrize(("tokens", "tile"), [(1, 1), (3, 4), (16, 16), (37, 16)])
    def test_tokens_side_by_side(monkeypatch, tokens, tile):
        monkeypatch.setattr(permute, "COLUMNS", 16)
        x, index = torch.randn(tokens, 45), torch.randperm(45).to(torch.int32)
        for order in (None, index):
            found = permute.side_by_side(x, order, tile)
            assert found.shape == (-(-tokens // tile), 45, tile)
            flat = found.transpose(1, 2).reshape(-1, 45)
            assert torch.equal(flat[:tokens], x if order is None else x[:, index.long()])
            assert not flat[tokens:].any()

    @pytest.mark.parametrize("length", [1, 30, 45, 90])
    def test_shifted_copies_of_one_token(monkeypatch, length):
        monkeypatch.setattr(permute, "COLUMNS", 16)
        x, index = torch.randn(1, 45), torch.randperm(45).to(torch.int32)
        place = (torch.arange(8)[:, None] + torch.arange(length)) % 45
        assert torch.equal(permute.shifted(x, None, 8, length), x[0, place])
        assert torch.equal(permute.shifted(x, index, 8, length), x[0, index.long()[place]])

    def test_permuting_any_number_of_rows(monkeypatch):
        monkeypatch.setattr(permute, "FEW_ROWS", 4)
        for shape in ((1, 7), (3, 5, 33), (6, 64)):
            x, index = torch.randn(shape), torch.randperm(shape[-1]).to(torch.int32)
            assert torch.equal(permute.permute(x, index), x[..., index.long()])
        monkeypatch.setattr(permute, "WIDEST", 32)
        assert torch.equal(permute.permute(x, index), x[..., index.long()])
        assert torch.equal(permute.inverse(index), torch.argsort(index))

    def test_an_inverse_is_kept_until_the_permutation_changes():
        index = torch.randperm(9).to(torch.int32)
        kept = permute.kept_inverse(index)
        assert torch.equal(kept, permute.inverse(index))
        assert permute.kept_inverse(index) is kept
        index.copy_(index.flip(0))
        assert torch.equal(permute.kept_inverse(index), permute.inverse(index))

    @pytest.mark.parametrize(("family", "shape"), ONE_EACH)
    def test_values_are_converted_to_the_dtype_of_the_input(make_case, family, shape):
        structure, options = FAMILIES[family]
        for values, inputs in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
            case = make_case(structure, *shape, 0.3, "i", values, **options)
            x = torch.randn(3, shape[1]).to(inputs)
            # The interpreter cuts where hardware rounds.
            close(layer.TritonKernel(case.layout)(x, None), case.weight.to(inputs), x, None, slack=2)

    @pytest.mark.parametrize(("family", "shape"), ONE_EACH)
    def test_a_bias_of_any_stride(make_case, family, shape):
        structure, options = FAMILIES[family]
        case = make_case(structure, *shape, 0.3, "io", **options)
        kernel, x = layer.TritonKernel(case.layout), torch.randn(3, shape[1])
        for bias in (torch.randn(2 * shape[0])[::2], torch.full((1,), 2.0).expand(shape[0])):
            close(kernel(x, bias), case.weight, x, bias)

    @pytest.mark.parametrize("activation", ["", "gelu", "gelu_tanh", "silu"])
    def test_second_derivatives(make_case, activation):
        structure, options = FAMILIES["block 16"]
        case = make_case(structure, 48, 33, 0.3, "io", **options)
        kernel, weight = layer.TritonKernel(case.layout), case.weight
        x, dy = torch.randn(3, 33, requires_grad=True), torch.randn(3, 48, requires_grad=True)
        seconds = []
        for y in (kernel(x, None, activation), REFERENCE[activation](torch.nn.functional.linear(x, weight))):
            (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
            wanted = (x, dy) if activation else (dy,)
            seconds.append((y, dx, *torch.autograd.grad(dx.square().sum(), wanted)))
        for one, other in zip(*seconds, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(("family", "shape"), ONE_EACH)
    def test_any_leading_shape_and_stride(make_case, family, shape):
        structure, options = FAMILIES[family]
        case = make_case(structure, *shape, 0.3, "io", **options)
        kernel = layer.TritonKernel(case.layout)
        for x in (torch.randn(shape[1]), torch.randn(2, 0, shape[1]), torch.randn(shape[1], 3).t()):
            y = kernel(x, None)
            assert y.shape == (*x.shape[:-1], shape[0])
            if x.numel():
                close(y, case.weight, x, None)

    def test_empty_block_rows_and_layers_that_are_full(make_case):
        case = make_case("block", 96, 64, 0.05, "o", block_size=16, block_rows="free")
        assert int(case.layout.tensors["row_offsets"].diff().min()) == 0
        x, bias = torch.randn(2, 64), torch.randn(96)
        close(layer.TritonKernel(case.layout)(x, bias), case.weight, x, bias)
        for structure, options in (("diag", {}), ("nm", {"nm": (4, 4)}), ("block", {"block_size": 16})):
            for shape in ((80, 48), (48, 80), (64, 64)):
                full = make_case(structure, *shape, 1.0, "i", **options)
                x = torch.randn(2, shape[1])
                close(layer.TritonKernel(full.layout)(x, None), full.weight, x, None)

    def test_what_is_held_beside_the_packed_tensors(make_case):
        block = make_case("block", 64, 96, 0.3, "i").layout
        count, columns = len(block.tensors["col_indices"]), -(-96 // block.parameters["block_size"])
        assert layer.TritonKernel(block).resident_bytes() == 4 * (2 * count + columns + 1)
        assert layer.TritonKernel(make_case("nm", 64, 64, 0.3, "o").layout).resident_bytes() == 64 * 4
        diagonals = layer.TritonKernel(make_case("diag", 100, 64, 0.3, "o").layout)
        assert diagonals.resident_bytes() == 100 * 4 + 2 * 2 * 4 + 2 * 8 * 32 * 4

    @pytest.mark.parametrize("name", ["diag", "nm", "block"])
    @pytest.mark.parametrize("autocast", [False, True])
    def test_a_layer_in_training_takes_the_kernels(monkeypatch, name, autocast):
        from padst_cli.training import sparse_linear
        from tests.training.test_sparse_linear import IN, make

        sparse = make(name)
        double = copy.deepcopy(sparse).double()
        monkeypatch.setattr(sparse_linear, "serves", lambda *_: False)
        monkeypatch.setattr(rules, "trains", lambda _, weight: weight.dtype is torch.float32)
        monkeypatch.setattr(rules, "training_pays", lambda *_: True)
        if autocast:
            monkeypatch.setattr(rules, "product_dtype", lambda _: torch.bfloat16)
        for sparse.dense_gradient in (False, True):
            sparse.zero_grad()
            double.zero_grad()
            x = torch.randn(2, 11, IN, requires_grad=True)
            wide = x.detach().double().requires_grad_()
            found, expected = sparse(x), double(wide)
            assert (sparse.computed_by, double.computed_by) == (f"cuda-triton-{name}", sparse_linear.DENSE_PRODUCT)
            assert found.dtype is (torch.bfloat16 if autocast else torch.float32)
            dy = torch.randn(found.shape).to(found.dtype)
            found.backward(dy)
            expected.backward(dy.double())
            wanted = double.weight.grad if sparse.dense_gradient else torch.where(sparse.mask, double.weight.grad, 0.0)
            pairs = [(found, expected), (x.grad, wide.grad), (sparse.weight.grad, wanted)]
            for one, other in [*pairs, (sparse.bias.grad, double.bias.grad)]:
                slack = (3e-2 if autocast else 1e-5) * float(other.detach().abs().max())
                torch.testing.assert_close(one.double(), other, rtol=0, atol=slack)
            sparse.weight.data.mul_(0.5)  # which is seen, though it leaves no trace on the parameter
            double.weight.data.mul_(0.5)

    @pytest.mark.usefixtures("gpu")
    @pytest.mark.parametrize("structure", ["diag", "nm", "block"])
    def test_steps_of_training_are_tuned_with_all_their_kernels(monkeypatch, structure):
        from padst_cli.bench.calibrate import _steps
        from tests.runtime.test_packed_linear import make

        monkeypatch.setattr(rules, "trains", lambda *_: True)
        timed = Clock()
        calibrate.calibrate_training(
            {"training": lambda: _steps(make(structure)[0])}, CUDA, tokens=(3,), tuner=timed, timer=timed
        )
        (by_tokens,) = measured.of(CUDA).paths.values()
        assert {tokens: set(times) for tokens, times in by_tokens.items()} == {
            4: {"torch-dense", f"cuda-triton-{structure}"}
        }
        kernels = {" ".join(name.split()[:-3]) for name in measured.of(CUDA).cuts}
        assert (
            kernels
            == {
                "diag": {"diag", "diag gradient"},
                "nm": {"nm", "nm tiles transposed", "nm gradient"},
                "block": {"block", "block transposed", "block gradient"},
            }[structure]
        )

    @pytest.mark.parametrize("structure", ["diag", "nm", "block"])
    def test_the_products_that_a_gpu_chooses_from_are_one(monkeypatch, structure):
        from padst_cli.bench.train import trainable
        from tests.runtime.test_packed_linear import make

        monkeypatch.setattr(rules, "trains", lambda *_: True)
        packed, weight, bias = make(structure)
        x = torch.randn(5, weight.shape[1])
        products = trainable(packed).gpu_products(x)
        assert list(products) == ["torch-dense", f"cuda-triton-{structure}"]
        for product in products.values():
            close(product(x), weight, x, bias)

    @pytest.mark.parametrize("dense_gradient", [False, True])
    def test_one_token_in_training_needs_no_further_dimension(monkeypatch, dense_gradient):
        from padst_cli.training import sparse_linear
        from tests.training.test_sparse_linear import IN, make

        sparse = make("block")
        double = copy.deepcopy(sparse).double()
        monkeypatch.setattr(sparse_linear, "serves", lambda *_: False)
        monkeypatch.setattr(rules, "trains", lambda _, weight: weight.dtype is torch.float32)
        monkeypatch.setattr(rules, "training_pays", lambda *_: True)
        sparse.dense_gradient = double.dense_gradient = dense_gradient
        x, dy = torch.randn(IN), torch.randn(sparse.out_features)
        sparse(x).backward(dy)
        double(x.double()).backward(dy.double())
        assert sparse.computed_by == "cuda-triton-block"
        wanted = double.weight.grad if dense_gradient else torch.where(sparse.mask, double.weight.grad, 0.0)
        torch.testing.assert_close(sparse.weight.grad.double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
        torch.testing.assert_close(sparse.bias.grad, dy)

    @pytest.mark.parametrize(("shape", "tokens", "worth"), [((5, 3), 2, permute.WORTH), ((8, 24), 1, 0)])
    def test_narrow_layers_read_no_values_behind_their_own(make_case, monkeypatch, shape, tokens, worth):
        """Rows of a program that are no rows of the layer, and diagonals that are none."""
        monkeypatch.setattr(permute, "WORTH", worth)
        case = make_case("diag", *shape, 0.6)
        values = case.layout.tensors["values"]
        room = torch.zeros(1 << 12)
        room[: values.numel()] = values.flatten()
        case.layout.tensors["values"] = room[: values.numel()].view(values.shape)
        first, end = (room.data_ptr() + 4 * count for count in (values.numel(), room.numel()))
        load, seen = interpreter.InterpreterBuilder.create_masked_load, []

        def watched(self, pointers, mask, *rest):
            addresses = pointers.data[mask.data]
            seen.append(bool(((addresses >= first) & (addresses < end)).any()))
            return load(self, pointers, mask, *rest)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", watched)
        check = torch.randn(tokens, shape[1])
        close(layer.TritonKernel(case.layout)(check, None), case.weight, check, None)
        assert seen
        assert not any(seen)

    @pytest.mark.parametrize("family", ["diag", "2:4", "block 16"])
    def test_the_operators_keep_torch_s_rules(make_case, family):
        structure, options = FAMILIES[family]
        kernel = layer.TritonKernel(on(make_case(structure, 32, 48, 0.3, "io", **options), CPU))
        x, bias = torch.randn(3, 48, requires_grad=True), torch.randn(32)
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(kernel._operator.operator, (x, bias, *kernel._packed, "silu"), test_utils=checks)

    @pytest.mark.parametrize("structure", ["diag", "nm", "block"])
    def test_a_packed_layer_takes_its_kernel(monkeypatch, structure):
        from padst_kernels.cpu import native

        from tests.runtime.test_packed_linear import make

        monkeypatch.setattr(native, "serves", lambda *_: False)
        monkeypatch.setattr(rules, "serves", lambda *_: True)
        packed, weight, bias = make(structure)
        assert packed.kernel_name(3) == f"cuda-triton-{structure}"
        with torch.inference_mode():
            packed(torch.randn(1, 80))
        x = torch.randn(3, 80, requires_grad=True)
        y = packed(x)
        close(y, weight, x, bias)
        y.sum().backward()
        torch.testing.assert_close(x.grad, weight.sum(dim=0).expand(3, 80), rtol=1e-4, atol=1e-4)
        packed.epilogue = ("silu", torch.nn.Identity())  # which would be called had the kernel no epilogue
        torch.testing.assert_close(packed(x), torch.nn.functional.silu(y))
        packed.epilogue = ("tanh", torch.nn.Tanh())
        torch.testing.assert_close(packed(x), y.tanh())
        packed.epilogue = None
        packed.values.data.zero_()
        packed.load_state_dict(packed.state_dict())
        assert torch.equal(packed(x), packed.bias.expand(3, 48))


@pytest.mark.skipif(INTERPRETED, reason="this is the process of the interpreter")
@pytest.mark.parametrize("share", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_kernels_under_the_interpreter(share):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", share, __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
