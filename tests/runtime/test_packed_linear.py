"""The packed layer as a module: exact weights, dtypes, caches that never go stale, copies, compilation."""

from __future__ import annotations

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from padst_kernels.cost import resident_bound
from padst_kernels.cpu import native, transient
from padst_kernels.cpu.isa import ISAS
from padst_kernels.cpu.library import library
from padst_kernels.dispatch import DenseInPlace
from torch.nn import functional

from padst_cli.errors import PadstError
from padst_cli.permutation.apply import from_structure, random_permutation
from padst_cli.runtime.packed_linear import PackedLinear
from padst_cli.structures import StructureOptions, structure_class, structure_names
from tests.costs import DENSE_WINS, costs


def make(structure="block", out_features=48, in_features=80, sides="io", bias=True, value_dtype=None, density=0.2):
    generator = torch.Generator().manual_seed(3)
    spec = structure_class(structure).for_density(out_features, in_features, density, StructureOptions())
    weight = torch.randn(out_features, in_features, generator=generator)
    mask = spec.project(weight.abs())
    perm_in = random_permutation(in_features, generator) if "i" in sides else None
    perm_out = random_permutation(out_features, generator) if "o" in sides else None
    vector = torch.randn(out_features, generator=generator) if bias else None
    layer = PackedLinear.from_sparse(spec, weight * mask, mask, vector, perm_in, perm_out, value_dtype)
    return layer, from_structure(weight * mask, perm_in, perm_out), vector


@pytest.mark.parametrize("sides", ["", "i", "o", "io"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("structure", structure_names())
def test_the_layer_equals_the_dense_one(structure, bias, sides):
    layer, weight, vector = make(structure, bias=bias, sides=sides)
    assert torch.equal(layer.dense_weight(), weight)
    assert torch.equal(layer.support().sum(), (weight != 0).sum())
    x = torch.randn(2, 5, 80)
    torch.testing.assert_close(layer(x), functional.linear(x, weight, vector))
    torch.testing.assert_close(layer(x[0, 0]), functional.linear(x[0, 0], weight, vector))


def test_wrong_widths_are_refused():
    layer, _, _ = make()
    with pytest.raises(ValueError, match="81 features"):
        layer(torch.randn(2, 81))


def test_what_is_stored():
    layer, _, _ = make(value_dtype=torch.bfloat16)
    state = layer.state_dict()
    assert set(state) == {"weight", "values", "row_offsets", "col_indices", "perm_in", "perm_out", "bias"}
    assert state["weight"].shape == (0,)
    assert state["values"].dtype is torch.bfloat16
    assert state["bias"].dtype is torch.float32
    assert state["perm_in"].dtype is torch.int32
    layer(torch.randn(1, 80))
    assert set(layer.state_dict()) == set(state)
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == ["bias"]


def test_values_of_unknown_dtypes_are_refused():
    with pytest.raises(PadstError, match="float64"):
        make(value_dtype=torch.float64)


@pytest.mark.parametrize("structure", ["diag", "block"])
def test_the_prepared_copy_follows_the_values(structure):
    layer, weight, vector = make(structure)
    x = torch.randn(3, 80)
    assert layer.prepared_bytes() == 0
    before = layer(x)
    assert layer.prepared_bytes() > 0
    with torch.no_grad():
        layer.values.mul_(2)
    torch.testing.assert_close(layer(x) - vector, 2 * (before - vector))
    layer.load_state_dict(make(structure)[0].state_dict())
    torch.testing.assert_close(layer(x), before)
    layer.values = torch.nn.Parameter(layer.values.detach() * 3, requires_grad=False)
    torch.testing.assert_close(layer(x) - vector, 3 * (before - vector))
    layer.double()
    assert layer.prepared_bytes() == 0
    torch.testing.assert_close(layer(x.double()).float(), functional.linear(x, 3 * weight, vector))
    layer.eval()
    assert layer.prepared_bytes() > 0
    layer.train()
    assert layer.prepared_bytes() == 0


@pytest.mark.parametrize("sides", ["", "io"])
@pytest.mark.parametrize("structure", ["diag", "nm", "block"])
def test_values_given_to_a_layer_that_has_let_go_of_its_own_are_used(structure, sides):
    layer, weight, vector = make(structure, sides=sides)
    x = torch.randn(3, 80)
    own = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    layer(x)
    for given in ({"values": own["values"] * 2}, {**own, "values": own["values"] * 2}):
        y = torch.func.functional_call(layer, given, (x,))
        torch.testing.assert_close(y, functional.linear(x, 2 * weight, vector))
    torch.testing.assert_close(layer(x), functional.linear(x, weight, vector))
    layer.values = torch.nn.Parameter(own["values"] * 3, requires_grad=False)
    torch.testing.assert_close(layer(x), functional.linear(x, 3 * weight, vector))


@pytest.mark.parametrize("structure", ["diag", "nm", "block"])
def test_tensors_that_do_not_fit_are_refused_before_a_kernel_reads_them(structure):
    layer, weight, vector = make(structure)
    x = torch.randn(3, 80)
    index = {"diag": "offsets", "nm": "indices", "block": "col_indices"}[structure]
    for key, wrong in (
        ("values", torch.nn.Parameter(weight, requires_grad=False)),
        (index, getattr(layer, index)[:-1]),
        (index, getattr(layer, index).long()),
        ("perm_in", layer.perm_in[:40]),
    ):
        for called in (False, True):
            if called:
                layer(x)
            right = getattr(layer, key)
            setattr(layer, key, wrong)
            with pytest.raises(PadstError, match=f"'{key}' is"):
                layer(x)
            setattr(layer, key, right)
    torch.testing.assert_close(layer(x), functional.linear(x, weight, vector))
    for wrong in (torch.zeros(47), torch.zeros(49), torch.zeros(1)):
        layer.bias = torch.nn.Parameter(wrong, requires_grad=False)
        with pytest.raises(ValueError, match="the layer has 48 outputs"):
            layer(x)


@pytest.mark.parametrize("structure", ["diag", "nm", "block"])
def test_what_is_prepared_follows_indices_and_permutations(structure):
    """In float64, which runs from the packed tensors; one that is replaced may leave its id to another."""
    layer, _, vector = make(structure)
    x = torch.randn(3, 80, dtype=torch.float64)

    def follows():
        expected = functional.linear(x, layer.dense_weight().double(), vector.double())
        torch.testing.assert_close(layer(x), expected)
        return expected

    seen = [follows()]
    layer.perm_in.copy_(layer.perm_in.flip(0))
    seen.append(follows())
    layer.perm_out.copy_(layer.perm_out.flip(0))
    seen.append(follows())
    for _ in range(2):
        layer.perm_in = layer.perm_in.roll(1)
    seen.append(follows())
    spec = layer.format.structure
    mask = spec.project(torch.rand(48, 80, generator=torch.Generator().manual_seed(5)))
    for key, tensor in spec.pack(torch.ones(48, 80) * mask, mask).items():
        if key != "values":
            getattr(layer, key).copy_(tensor)
    seen.append(follows())
    assert not any(torch.equal(one, other) for one, other in pairwise(seen))


def test_what_is_prepared_is_not_taken_for_that_of_another_tensor_at_the_same_place():
    layer, weight, _ = make("diag", bias=False)
    x = torch.randn(3, 80, dtype=torch.float64)
    values = layer.values.detach().clone()
    for factor in range(1, 8):
        for times in (2, 1):  # the second may be made where the one before the first was
            layer.values = torch.nn.Parameter(values * factor * times, requires_grad=False)
        torch.testing.assert_close(layer(x), functional.linear(x, (factor * weight).double()))


def test_values_made_in_inference_mode_work():
    with torch.inference_mode():
        layer, weight, vector = make("diag")
        x = torch.randn(2, 80)
        torch.testing.assert_close(layer(x), functional.linear(x, weight, vector))
        torch.testing.assert_close(layer(x), functional.linear(x, weight, vector))


@pytest.mark.parametrize("structure", ["diag", "nm", "block"])
@pytest.mark.parametrize("ask", [copy.deepcopy, torch.nn.Module.state_dict, lambda layer: layer.perm_in])
def test_tensors_that_came_back_in_inference_mode_take_changes(structure, ask):
    layer, _, _ = make(structure)
    state = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    x = torch.randn(2, 80)
    with torch.inference_mode():
        expected = layer(x)
        ask(layer)
    layer.load_state_dict(state)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("structure", structure_names())
@pytest.mark.parametrize("where", ["cpu", "dense", "float64"])
def test_the_default_device_changes_nothing(structure, where, machine_costs):
    if where == "dense":
        machine_costs(KEPT_DENSE)
    layer, weight, _ = make(structure, 256, 512, density=0.96 if where == "dense" else 0.2, bias=False)
    state = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    dtype = torch.float64 if where == "float64" else torch.float32
    for tokens in (2, 65):
        x = torch.randn(tokens, 512, dtype=dtype, requires_grad=True)
        dy = torch.ones(tokens, 256, dtype=dtype)
        with torch.device("meta"):
            y = layer(x)
            (dx,) = torch.autograd.grad(y, x, dy)
            found, stored = layer.dense_weight(), layer.packed_tensors()
        torch.testing.assert_close(y, functional.linear(x, weight.to(dtype)), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dx, dy @ weight.to(dtype), rtol=1e-4, atol=1e-4)
        assert torch.equal(found, weight)
        assert all(torch.equal(tensor, state[key]) for key, tensor in stored.items())
    with torch.device("meta"):
        after = layer.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in state.items())


def test_values_of_another_dtype_than_kernels_take_are_served_by_torch():
    layer, weight, _ = make("diag", bias=False)
    layer.double()
    x = torch.randn(3, 80)
    for dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(layer(x.to(dtype)), functional.linear(x.to(dtype), weight.to(dtype)))


def test_copies_share_nothing_and_carry_no_prepared_copy():
    layer, _, _ = make("diag")
    x = torch.randn(2, 80)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.prepared_bytes() == 0
        assert torch.equal(twin(x), expected)
        with torch.no_grad():
            twin.values.zero_()
        assert torch.equal(layer(x), expected)


def test_a_shallow_copy_goes_its_own_way():
    layer, _, _ = make("diag")
    twin, x = copy.copy(layer), torch.randn(2, 80)
    expected = layer(x)
    assert torch.equal(twin(x), expected)
    assert twin._native is not layer._native
    twin.train()
    assert torch.equal(layer(x), expected)


@pytest.fixture
def often():
    """Threads take turns as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("often")
def test_threads_may_call_a_layer_and_ask_for_its_tensors_at_once():
    original, weight, vector = make("diag")
    x = torch.randn(3, 80)
    expected = functional.linear(x, weight, vector)

    def use(number, layer):
        with torch.no_grad():
            for turn in range(4):
                torch.testing.assert_close(layer(x), expected)
                if (number + turn) % 4 == 0:
                    assert (
                        layer.state_dict()["values"].shape
                        == original.format.structure.layout(torch.float32)["values"][0]
                    )
                elif (number + turn) % 4 == 1:
                    layer.train().eval()
                elif (number + turn) % 4 == 2:
                    assert torch.equal(layer.dense_weight(), weight)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(25):
            layer = copy.deepcopy(original)
            list(pool.map(use, range(4), [layer] * 4))
            assert torch.equal(layer.dense_weight(), weight)


def test_the_image_dies_with_its_layer():
    # Without waiting for the garbage collector: the images are as large as the model.
    import gc
    import weakref

    layer, _, _ = make("diag")
    layer(torch.randn(1, 80))
    kernel = weakref.ref(layer._native)
    gc.disable()
    try:
        layer.train()
        assert kernel() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("structure", ["diag", "block"])
def test_torch_compile_takes_the_layer_in_one_graph(structure):
    layer, _, _ = make(structure)
    x = torch.randn(4, 80)
    expected = layer(x)
    for warm in (True, False):
        if not warm:
            layer.train()
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        for _ in range(3):
            torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(compiled(x[:2]), expected[:2])


@pytest.mark.parametrize("warm_in_inference_mode", [False, True])
@pytest.mark.parametrize("structure", ["diag", "nm", "block"])
def test_gradients_of_a_compiled_layer_are_those_of_the_eager_one(structure, warm_in_inference_mode):
    layer, _, _ = make(structure)
    with torch.inference_mode(warm_in_inference_mode):
        layer(torch.randn(2, 80))
    x = torch.randn(4, 3, 80, requires_grad=True)
    dy = torch.randn(4, 3, 48)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(layer(x), (x, layer.bias), dy)
    found = torch.autograd.grad(compiled(x), (x, layer.bias), dy)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    # What asks for no gradient of the input still has one of the bias.
    torch.testing.assert_close(torch.autograd.grad(compiled(x.detach()), layer.bias, dy)[0], expected[1])


def test_the_operators_of_a_graph_keep_torchs_rules():
    layer, _, vector = make()
    layer(torch.randn(2, 80))
    image = layer._native.image
    for bias in (None, vector.requires_grad_()):
        x = torch.randn(3, 80, requires_grad=True)
        torch.library.opcheck(torch.ops.padst.sparse_linear.default, (x, image, bias, 48))
    torch.library.opcheck(torch.ops.padst.sparse_weight.default, (image, 48, 80, torch.float32))


@pytest.mark.parametrize("structure", ["diag", "block"])
def test_a_compact_layer_is_compiled_for_float64_too(structure):
    layer, weight, vector = make(structure)
    layer(torch.randn(1, 80))
    assert layer._native is not None
    torch.compiler.reset()
    layer.bias = torch.nn.Parameter(vector.double())
    x = torch.randn(4, 80, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), functional.linear(x, weight.double(), vector.double()))


def test_autocast_works():
    for structure in ("diag", "block"):
        layer, weight, vector = make(structure)
        x = torch.randn(4, 80)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        torch.testing.assert_close(y.float(), functional.linear(x, weight, vector), rtol=3e-2, atol=5e-2)


def test_kernel_names():
    for structure in ("diag", "block"):
        assert make(structure)[0].kernel_name(1) == f"cpu-{ISAS[library().padst_isa()]}-{structure}"


@pytest.mark.parametrize("structure", ["diag", "nm", "block"])
def test_a_compact_layer_holds_nothing_twice_and_gives_everything_back(structure):
    layer, weight, _ = make(structure)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    layer(torch.randn(3, 80))
    assert layer._parameters["values"] is None
    assert {key for key, _ in (*layer.named_parameters(), *layer.named_buffers())} == {"weight", "bias"}
    assert layer.value_dtype is before["values"].dtype
    torch.testing.assert_close(layer.dense_weight(), weight)
    assert layer._native is not None
    after = layer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert layer._native is None


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("structure", ["diag", "nm", "block"])
def test_torch_export_takes_the_layer(structure, called):
    """Called before, it is exported as its kernel; otherwise as its packed tensors, which the graph unpacks."""
    layer, weight, vector = make(structure)
    x = torch.randn(4, 80)
    if called:
        layer(x)
    exported = torch.export.export(layer, (x,))
    targets = {str(node.target) for node in exported.graph.nodes}
    assert ("padst.sparse_linear.default" in targets) == called
    expected = functional.linear(x, weight, vector)
    torch.testing.assert_close(exported.module()(x), expected)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("structure", ["diag", "nm", "block"])
def test_torch_jit_traces_the_layer(structure, compact):
    layer, weight, vector = make(structure)
    layer.requires_grad_(False)  # a function's trace holds what it reads as constants, which have no gradients
    if compact:
        layer(torch.randn(1, 80))
    traced = torch.jit.trace(lambda x: 2 * layer(x), torch.randn(4, 80), check_trace=False)
    assert ("padst::sparse_linear" in str(traced.graph)) == compact
    for x in (torch.randn(4, 80), torch.randn(7, 80)):
        torch.testing.assert_close(traced(x), 2 * functional.linear(x, weight, vector))
    x = torch.randn(3, 80)
    traced = torch.jit.trace(layer, x)
    torch.testing.assert_close(traced(x), functional.linear(x, weight, vector))


KEPT_DENSE = costs(kernel=1e-9, dense=1e-10, unpack=1e-9)


@pytest.mark.parametrize("structure", ["diag", "nm"])
def test_without_compiled_kernels_a_dense_weight_takes_the_place_of_the_packed_tensors(structure, monkeypatch):
    monkeypatch.setattr(native, "serves", lambda *_: False)
    layer, weight, vector = make(structure)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    x = torch.randn(3, 80)
    torch.testing.assert_close(layer(x), functional.linear(x, weight, vector))
    assert layer._parameters["values"] is None
    assert layer.prepared_bytes() <= 48 * 80 * 4 + 48 * 80 // 8 + (48 + 80) * 4
    after = layer.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("structure", ["diag", "nm", "block"])
@pytest.mark.parametrize("shape", [(256, 512), (250, 509)])
def test_the_densest_layers_live_as_dense_weights_and_give_everything_back(structure, shape, machine_costs):
    machine_costs(KEPT_DENSE)
    out_features, in_features = shape
    layer, weight, vector = make(structure, *shape, "io" if structure == "diag" else "i", density=0.96)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    x = torch.randn(3, in_features, requires_grad=True)
    y = layer(x)
    assert isinstance(layer._native, DenseInPlace)
    assert layer.kernel_name(1) == layer.kernel_name(4096) == "torch-dense"
    torch.testing.assert_close(y, functional.linear(x, weight, vector))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.ones(3, out_features) @ weight)
    assert layer._parameters["values"] is None
    assert layer.prepared_bytes() <= layer_bound(layer)
    assert torch.equal(layer.dense_weight(), weight)
    assert layer.dense_weight().data_ptr() != layer._native.weight.data_ptr()
    after = layer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert layer._native is None


def layer_bound(layer: PackedLinear) -> float:
    structure = layer.format.structure
    return resident_bound(structure.name, structure.parameters().get("m", 0), structure.nonzeros, 4)


def test_a_layer_kept_dense_takes_other_dtypes_and_graphs(machine_costs):
    machine_costs(KEPT_DENSE)
    layer, weight, vector = make("block", 256, 512, "i", density=0.96)
    x = torch.randn(4, 512)
    expected = functional.linear(x, weight, vector)
    torch.testing.assert_close(layer(x), expected)
    half = layer(x.bfloat16())
    assert half.dtype is torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=5e-2, atol=0.3)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), expected)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), expected)


@pytest.mark.parametrize("structure", ["diag", "nm", "block"])
def test_graphs_choose_their_path_by_the_tokens_they_are_called_with(structure, machine_costs):
    machine_costs(DENSE_WINS)
    layer, weight, vector = make(structure, density=0.5)
    layer(torch.randn(1, 80))
    dynamic = {0: torch.export.Dim("tokens", min=2, max=512)}
    graph = torch.export.export(layer, (torch.randn(4, 80),), dynamic_shapes=(dynamic,)).module()
    transient._scratch.__dict__.clear()
    few, many = torch.randn(4, 80), torch.randn(64, 80)
    torch.testing.assert_close(graph(few), functional.linear(few, weight, vector))
    assert transient.scratch_bytes() == 0
    torch.testing.assert_close(graph(many), functional.linear(many, weight, vector))
    assert transient.scratch_bytes() == 48 * 80 * 4
