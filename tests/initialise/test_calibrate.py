import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from padst_cli.errors import PadstError
from padst_cli.events import CalibrationProgress, Message
from padst_cli.initialise import calibrate, initialise, refine
from padst_cli.initialise.blocks import Unit
from padst_cli.permutation.apply import check_permutation, from_structure, to_structure
from padst_cli.plan import make_plan
from padst_cli.recipe import Recipe
from padst_cli.tracing import run_model
from padst_cli.tying import untie

BASE = Recipe(structure="diag", sparsity=0.6).updated({"permutation.kind": "assignment"})
NAMES = ["gpt2", "llama", "qwen3", "gpt-neox", "opt", "bert", "albert", "t5", "vit", "swin"]


def run(model: nn.Module, batches, recipe: Recipe = BASE, **changes):
    recipe = recipe.updated({key.replace("__", "."): value for key, value in changes.items()})
    plan = make_plan(model, recipe)
    student, events = copy.deepcopy(model), []
    starts = initialise(model, student, plan, batches, recipe, events.append)
    return SimpleNamespace(student=student, plan=plan, starts=starts, events=events, recipe=recipe)


def dense(result, name: str) -> Tensor:
    layer = next(layer for layer in result.plan.layers if layer.name == name)
    weight = result.student.get_submodule(name).weight.detach()
    return weight.T if layer.transposed else weight


def texts(result) -> list[str]:
    return [event.text for event in result.events if isinstance(event, Message)]


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch):
    """The statistics each layer was started from, by layer name."""
    seen = {}
    original = calibrate.start_layers

    def spy(layers, dense, statistics, recipe, on_event):
        seen.update((layer.name, statistics) for layer in layers)
        return original(layers, dense, statistics, recipe, on_event)

    monkeypatch.setattr(calibrate, "start_layers", spy)
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_block_by_block_equals_full_passes(name: str, make_model, make_batches, monkeypatch, spied) -> None:
    model, batches = make_model(name), make_batches(name)
    chained = run(model, batches)
    seen = dict(spied)
    find = calibrate.find_units
    monkeypatch.setattr(
        calibrate, "find_units", lambda *args: tuple(Unit("", unit.groups, False) for unit in find(*args))
    )
    exact = run(model, batches)
    assert "full forward passes" in texts(exact)[0]
    for layer in chained.plan.layers:
        for moment in ("gram", "cross", "dense_gram"):
            torch.testing.assert_close(
                getattr(seen[layer.name], moment), getattr(spied[layer.name], moment), rtol=1e-4, atol=1e-3
            )
        assert torch.equal(chained.starts[layer.name].mask, exact.starts[layer.name].mask)
        assert seen[layer.name].tokens == spied[layer.name].tokens > 0


@pytest.mark.parametrize("name", NAMES)
def test_student_holds_the_starts_and_nothing_else_changed(name: str, make_model, make_batches) -> None:
    model = make_model(name).train()
    before = copy.deepcopy(model.state_dict())
    result = run(model, make_batches(name))
    assert model.training
    assert list(result.starts) == [layer.name for layer in result.plan.layers]
    for layer in result.plan.layers:
        start = result.starts[layer.name]
        assert torch.equal(dense(result, layer.name), from_structure(start.weight, start.perm_in, start.perm_out))
        assert torch.equal(start.structure.expand(start.structure.units_of(start.mask)), start.mask)
        assert not start.weight[~start.mask].any()
        assert start.weight.dtype == torch.float32
        assert (start.bias is not None) == layer.bias
        for side, perm, size in (
            ("input", start.perm_in, layer.in_features),
            ("output", start.perm_out, layer.out_features),
        ):
            assert (perm is not None) == (side in layer.sides)
            if perm is not None:
                check_permutation(perm, size, side)
    targets = {f"{layer.name}.weight" for layer in result.plan.layers}
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    for key, value in result.student.state_dict().items():
        assert key in targets or torch.equal(value, before[key])


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt-neox", "bert", "vit"])
def test_each_layer_sees_the_sparse_model_before_it(name: str, make_model, make_batches, spied) -> None:
    model, batches = make_model(name), make_batches(name)
    result = run(model, batches)
    order = [event.layer for event in result.events if isinstance(event, CalibrationProgress)]
    for position in (0, 3, len(order) // 2, len(order) - 1):
        target = order[position]
        partial = copy.deepcopy(model)
        for layer in order[:position]:
            if spied[layer] is not spied[target]:
                partial.get_submodule(layer).weight.data = result.student.get_submodule(layer).weight.data
        width = spied[target].gram.shape[0]
        gram, cross = torch.zeros(width, width), torch.zeros(width, width)
        for batch in batches:
            sparse, original = inputs_of(partial, target, batch), inputs_of(model, target, batch)
            gram += sparse.T @ sparse
            cross += sparse.T @ original
        torch.testing.assert_close(spied[target].gram, gram, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(spied[target].cross, cross, rtol=1e-4, atol=1e-3)
        assert position == 0 or not torch.allclose(gram, cross, rtol=1e-2)


@torch.no_grad()
def inputs_of(model: nn.Module, layer: str, batch: dict[str, Tensor]) -> Tensor:
    caught: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    run_model(model.eval(), batch)
    handle.remove()
    rows = caught[0].reshape(-1, caught[0].shape[-1])
    return rows[batch["attention_mask"].bool().ravel()] if "attention_mask" in batch else rows


@pytest.mark.parametrize("structure", ["diag", "nm", "block", "unstructured"])
def test_refit_lowers_the_error_and_without_it_old_weights_stay(structure: str, make_model, make_batches) -> None:
    model, batches = make_model("llama"), make_batches("llama")
    fitted = run(model, batches, structure=structure)
    for start in fitted.starts.values():
        assert start.error <= start.error_mask + 1e-6
        assert 0.0 < start.kept <= 1.0
    masked = run(model, batches, structure=structure, calibration__refit=False)
    for name, start in masked.starts.items():
        old = to_structure(model.get_submodule(name).weight, start.perm_in, start.perm_out)
        assert torch.equal(start.weight, torch.where(start.mask, old, 0.0))
        assert start.error == start.error_mask
    assert mean_error(fitted) < mean_error(masked)


def mean_error(result) -> float:
    return sum(start.error for start in result.starts.values()) / len(result.starts)


@pytest.mark.parametrize("kind", ["learned", "assignment", "random", "none"])
def test_permutation_kinds(kind: str, make_model, make_batches) -> None:
    model, batches = make_model("gpt2"), make_batches("gpt2")
    result = run(model, batches, permutation__kind=kind)
    again = run(model, batches, permutation__kind=kind)
    for name, start in result.starts.items():
        perm = start.perm_in if start.perm_in is not None else start.perm_out
        assert (perm is None) == (kind == "none")
        assert torch.equal(start.weight, again.starts[name].weight)
        if kind == "random":
            assert not torch.equal(perm, torch.arange(len(perm)).int())
    if kind == "random":
        other = run(model, batches, permutation__kind=kind, seed=1)
        assert any(not torch.equal(other.starts[n].weight, s.weight) for n, s in result.starts.items())


def test_both_sides(make_model, make_batches) -> None:
    result = run(make_model("llama"), make_batches("llama"), structure="block", permutation__side="both")
    for start in result.starts.values():
        assert start.perm_in is not None
        assert start.perm_out is not None


def test_padding_does_not_count(make_model, make_batches) -> None:
    batches = make_batches("bert")
    other = [dict(batch) for batch in batches]
    for batch in other:
        batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)
    one, two = run(make_model("bert"), batches), run(make_model("bert"), other)
    for name, start in one.starts.items():
        torch.testing.assert_close(start.weight, two.starts[name].weight, rtol=1e-3, atol=1e-4)


def test_progress_and_mode_are_told(make_model, make_batches) -> None:
    result = run(make_model("gpt2"), make_batches("gpt2"))
    progress = [event for event in result.events if isinstance(event, CalibrationProgress)]
    assert [event.done for event in progress] == list(range(1, 13))
    assert {event.total for event in progress} == {12}
    assert texts(result) == [
        "calibrating 12 layers in 3 blocks, block by block from 1 full pass",
        "measuring how much each output of a layer matters to the dense model's prediction",
    ]


class Experts(nn.Module):
    """One block whose tokens go to the expert that the sign of their first input picks; the last gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Module()])
        block = self.layers[0]
        block.up = nn.Linear(16, 16)
        block.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        block.forward = self._block

    def _block(self, x: Tensor) -> Tensor:
        block = self.layers[0]
        x = block.up(x)
        result = torch.zeros_like(x)
        for index, chosen in enumerate((x[:, 0] > 0, x[:, 0] <= 0)):
            result[chosen] = block.experts[index](x[chosen])
        return result

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


def test_experts_see_only_their_tokens_and_an_idle_one_keeps_its_weights() -> None:
    torch.manual_seed(0)
    model = Experts()
    # A closure would survive deepcopy with the old model in it.
    student = Experts()
    student.load_state_dict(model.state_dict())
    recipe = BASE.updated({"sparsity": 0.5})
    plan, events = make_plan(model, recipe), []
    starts = initialise(model, student, plan, [{"x": torch.randn(64, 16)} for _ in range(2)], recipe, events.append)
    idle = starts["layers.0.experts.2"]
    old = to_structure(model.layers[0].experts[2].weight.detach(), idle.perm_in, idle.perm_out)
    assert torch.equal(idle.weight, torch.where(idle.mask, old, 0.0))
    assert math.isnan(idle.error)
    assert any("layers.0.experts.2 saw no calibration input" in e.text for e in events if isinstance(e, Message))
    for index in (0, 1):
        start = starts[f"layers.0.experts.{index}"]
        assert start.error < start.error_mask


def test_no_data_is_refused(make_model) -> None:
    with pytest.raises(PadstError, match="no calibration data"):
        run(make_model("gpt2"), [])


def test_inputs_that_are_not_finite_are_refused_with_the_layer(make_model, make_batches) -> None:
    model = make_model("gpt2")
    model.transformer.h[1].ln_1.weight.data.fill_(float("nan"))
    with pytest.raises(PadstError, match=r"transformer\.h\.1\.attn\.c_attn: .*NaN"):
        run(model, make_batches("gpt2"), structure="unstructured")


@pytest.mark.parametrize("kind", ["learned", "random"])
@pytest.mark.parametrize("structure", ["diag", "nm", "block"])
@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
def test_layers_that_read_one_input_share_its_order(
    name: str, structure: str, kind: str, make_model, make_batches
) -> None:
    changes = {"structure": structure, "permutation__kind": kind, "permutation__share": True}
    result = run(make_model(name), make_batches(name), **changes)
    groups = {layer.shared for layer in result.plan.layers if layer.shared}
    assert groups
    for group in groups:
        first, *others = (result.starts[layer] for layer in group)
        assert not torch.equal(first.perm_in, torch.arange(len(first.perm_in)).int())
        for other in others:
            assert torch.equal(other.perm_in, first.perm_in)
            assert (other.perm_out is None) == (structure == "nm")
        # Four blocks of which two are kept may well be the same two.
        assert structure == "block" or any(not torch.equal(other.mask, first.mask) for other in others)
    for layer in result.plan.layers:
        start = result.starts[layer.name]
        assert torch.equal(dense(result, layer.name), from_structure(start.weight, start.perm_in, start.perm_out))
        assert start.error <= start.error_mask + 1e-6


def test_sharing_costs_little_of_what_each_layer_keeps(make_model, make_batches) -> None:
    own = run(make_model("llama"), make_batches("llama"), structure="block", permutation__side="input")
    together = run(
        make_model("llama"),
        make_batches("llama"),
        structure="block",
        permutation__share=True,
        permutation__side="input",
    )
    none = run(make_model("llama"), make_batches("llama"), structure="block", permutation__kind="none")
    kept = [
        sum(result.starts[layer.name].kept for layer in together.plan.layers if layer.shared)
        for result in (own, together, none)
    ]
    assert kept[0] > kept[1] > kept[2]


def test_both_sides_of_layers_that_share(make_model, make_batches) -> None:
    result = run(make_model("llama"), make_batches("llama"), permutation__share=True, permutation__side="both")
    for layer in result.plan.layers:
        start = result.starts[layer.name]
        check_permutation(start.perm_out, layer.out_features, "output")
        assert torch.equal(start.perm_in, result.starts[(layer.shared or (layer.name,))[0]].perm_in)


def test_layers_that_were_planned_to_share_but_read_apart_are_refused(make_model, make_batches) -> None:
    model, batches = make_model("llama"), make_batches("llama")
    plan = make_plan(model, BASE)
    pair = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj")
    layers = tuple(replace(layer, shared=pair) if layer.name in pair else layer for layer in plan.layers)
    with pytest.raises(PadstError, match=r"q_proj and .*o_proj were planned to share"):
        initialise(model, copy.deepcopy(model), replace(plan, layers=layers), batches, BASE, [].append)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_head_reads_the_final_norm_of_the_sparse_model(name: str, make_model, make_batches, spied) -> None:
    model, batches = make_model(name), make_batches(name)
    recipe = BASE.updated({"targets": ("default", "lm_head"), "sparsity": 0.5})
    plan, student = make_plan(model, recipe), copy.deepcopy(model)
    if plan.unties:
        with pytest.raises(ValueError, match="untie the student"):
            initialise(model, student, plan, batches, recipe, [].append)
        untie(student)
    embedding = student.get_input_embeddings().weight.detach().clone()
    starts = initialise(model, student, plan, batches, recipe, [].append)
    assert torch.equal(student.get_input_embeddings().weight, embedding)
    start = starts["lm_head"]
    assert torch.equal(student.lm_head.weight, from_structure(start.weight, start.perm_in, start.perm_out))
    assert start.error < start.error_mask
    gram = sum(x.T @ x for x in (inputs_of(student, "lm_head", batch) for batch in batches))
    torch.testing.assert_close(spied["lm_head"].gram, gram, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("structure", ["diag", "nm"])
def test_a_wide_start_has_the_order_of_the_narrow_one(structure: str, make_model, make_batches) -> None:
    changes = {"structure": structure, "sparsity": 0.75}
    narrow, half, whole = (
        run(make_model("gpt2"), make_batches("gpt2"), **changes, support__start_density=density)
        for density in (None, 0.5, 1.0)
    )
    first = narrow.plan.layers[0].name
    assert torch.equal(half.starts[first].perm_in, narrow.starts[first].perm_in)
    for layer in narrow.plan.layers:
        masks = [each.starts[layer.name].mask for each in (narrow, half, whole)]
        counts = [int(mask.sum()) for mask in masks]
        assert counts == [layer.structure.at_density(at).nonzeros for at in (0.25, 0.5, 1.0)]
        assert not dense(half, layer.name)[~from_structure(masks[1], *_orders(half, layer.name))].any()
        assert narrow.starts[layer.name].error > half.starts[layer.name].error
    torch.testing.assert_close(dense(whole, first), dense_before("gpt2", first, make_model), rtol=0.05, atol=0.05)


def _orders(result, name: str) -> tuple[Tensor | None, Tensor | None]:
    return result.starts[name].perm_in, result.starts[name].perm_out


def dense_before(family: str, name: str, make_model) -> Tensor:
    return make_model(family).get_submodule(name).weight.detach().T


def test_an_assigned_order_stays_and_its_support_is_refined(make_model, make_batches) -> None:
    model, batches = make_model("llama"), make_batches("llama")
    changes = {"structure": "nm", "permutation__kind": "assignment"}
    plain, refined = (run(model, batches, **changes, calibration__refine_rounds=rounds) for rounds in (0, 8))
    pairs = [(plain.starts[name], refined.starts[name]) for name in plain.starts]
    assert all(torch.equal(one.perm_in, one.assigned_in) for pair in pairs for one in pair)
    first = plain.plan.layers[0].name
    assert torch.equal(plain.starts[first].perm_in, refined.starts[first].perm_in)
    assert not torch.equal(plain.starts[first].mask, refined.starts[first].mask)
    learned = run(model, batches, **{**changes, "permutation__kind": "learned"}, calibration__refine_rounds=8)
    assert torch.equal(learned.starts[first].assigned_in, plain.starts[first].perm_in)
    assert not torch.equal(learned.starts[first].perm_in, plain.starts[first].perm_in)


@pytest.mark.parametrize("structure", ["diag", "nm", "block"])
def test_refining_lowers_the_error_of_the_start(structure: str, make_model, make_batches) -> None:
    """Of the first layer: those after it see other inputs. Rows count alike: then the error is what is refined for."""
    model, batches = make_model("llama"), make_batches("llama")
    changes = {"structure": structure, "permutation__kind": "learned", "calibration__sensitivity": 0.0}
    plain, refined = (run(model, batches, **changes, calibration__refine_rounds=rounds) for rounds in (0, 8))
    name = plain.plan.layers[0].name
    assert refined.starts[name].error < 0.97 * plain.starts[name].error
    assert 0.0 < refined.starts[name].kept < plain.starts[name].kept


def test_refining_leaves_random_permutations_as_drawn(make_model, make_batches) -> None:
    model, batches = make_model("llama"), make_batches("llama")
    changes = {"structure": "nm", "permutation__kind": "random"}
    plain, refined = (run(model, batches, **changes, calibration__refine_rounds=rounds) for rounds in (0, 8))
    pairs = [(plain.starts[name], refined.starts[name]) for name in plain.starts]
    assert all(torch.equal(one.perm_in, other.perm_in) for one, other in pairs)
    assert any(not torch.equal(one.mask, other.mask) for one, other in pairs)


def test_a_layer_that_is_refined_for_fewer_rounds_is_told_of(make_model, make_batches, monkeypatch) -> None:
    monkeypatch.setattr(refine, "BUDGET_FLOPS", 1.0)
    result = run(make_model("gpt2"), make_batches("gpt2"), calibration__refine_rounds=8)
    cut = [text for text in texts(result) if "refined for 1 of 8 rounds" in text]
    assert len(cut) == len(result.plan.layers)
    assert cut[0].startswith(result.plan.layers[0].name)
