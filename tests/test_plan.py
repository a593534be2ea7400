"""The plan: heads that are untied, permutations that are shared, and what both cost."""

import pytest
import torch

from padst_cli.errors import PadstError
from padst_cli.plan import make_plan
from padst_cli.recipe import Recipe
from padst_cli.tying import untie
from tests import models

SHARED = {"permutation.share": True}


def plan_of(family, changes=None, **sizes):
    with torch.device("meta"):
        model = models.build(family, **sizes)
    return make_plan(model, Recipe(structure="diag", sparsity=0.5).updated(changes or {}))


def by_ending(plan, ending):
    return next(layer for layer in plan.layers if layer.name.endswith(ending))


@pytest.mark.parametrize(
    ("family", "sizes"), [("gpt2", {}), ("bert-mlm", {}), ("llama", {"tie_word_embeddings": True})]
)
def test_parameters_of_an_untied_model(family, sizes):
    head = "decoder" if family == "bert-mlm" else "lm_head"
    model = models.build(family, **sizes)
    recipe = Recipe(structure="diag", sparsity=0.5, targets=("default", head))
    plan, plain = make_plan(model, recipe), make_plan(model, recipe.updated({"targets": ()}))
    assert plan.unties
    assert not plain.unties
    assert plan.dense_bytes(torch.float32) == plain.dense_bytes(torch.float32)
    untie(model)
    entries = sum(layer.out_features * layer.in_features for layer in plan.layers)
    assert plan.other_parameters + entries == sum(parameter.numel() for parameter in model.parameters())
    assert plan.run_bytes(soft=False, distill=False) > plain.run_bytes(soft=False, distill=False)


def test_layers_that_share_have_one_input_permutation():
    soft = {"permutation.learner": "soft"}
    own, together = plan_of("llama", soft), plan_of("llama", {**SHARED, **soft})
    # Grouped queries: 16 outputs of 32 inputs, of which the outputs are cheaper to train.
    assert by_ending(own, "k_proj").trained == ("output",)
    key = by_ending(together, "k_proj")
    assert key.trained == ("input",)
    assert key.sides == by_ending(own, "k_proj").sides == ("input", "output")
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    assert key.shared == by_ending(together, "q_proj").shared == tuple(names)
    assert [layer.name for layer in together.layers if layer.shared and layer.leads][:1] == names[:1]
    assert by_ending(together, "o_proj").shared == ()
    assert by_ending(together, "o_proj").note is None
    assert by_ending(together, "up_proj").shared == tuple(f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up"))
    assert not any(layer.shared for layer in own.layers)


def test_the_first_in_model_order_leads():
    # OPT makes key, value and query in that order and runs query, key, value.
    shared = by_ending(plan_of("opt", SHARED), "q_proj").shared
    assert [name.rpartition(".")[2] for name in shared] == ["k_proj", "v_proj", "q_proj"]


def test_soft_matrices_count_once():
    own = plan_of("llama", {"permutation.side": "input"})
    together = plan_of("llama", {**SHARED, "permutation.side": "input"})
    saved = own.run_bytes(True, False) - together.run_bytes(True, False)
    assert saved == 2 * 3 * 16 * 32**2  # two blocks, three layers each, moments and gradient included
    assert own.packed_bytes(torch.float32, torch.float32) == together.packed_bytes(torch.float32, torch.float32)


def test_grouped_matrices_count_with_their_padding():
    plan = plan_of("llama", {"permutation.side": "input"})
    bare = plan.run_bytes(False, False)
    entries = {32: 2 * 6 * 2 * 20**2, 48: 2 * 1 * 3 * 20**2}  # groups of 20 in two blocks; down_proj has 48 inputs
    assert plan.run_bytes(True, False, group=20) - bare == 16 * sum(entries.values())
    assert plan.run_bytes(True, False, group=64) == plan.run_bytes(True, False)


def test_layers_of_unlike_groups_do_not_share(tmp_path):
    table = tmp_path / "allocation.yaml"
    table.write_text("k_proj: 0.8\n")
    changes = {**SHARED, "structure": "nm", "allocation": str(table)}
    plan = plan_of("llama", changes)
    assert [name.rpartition(".")[2] for name in by_ending(plan, "q_proj").shared] == ["q_proj", "v_proj"]
    assert by_ending(plan, "k_proj").shared == ()
    assert len(by_ending(plan_of("llama", {**changes, "structure": "diag"}), "q_proj").shared) == 3


@pytest.mark.parametrize("changes", [{"permutation.kind": "none"}, {"structure": "unstructured"}])
def test_without_permutations_nothing_is_shared(changes):
    assert not any(layer.shared for layer in plan_of("llama", {**SHARED, **changes}).layers)


def test_output_side_cannot_be_shared():
    with pytest.raises(PadstError, match="side 'output' permutes no inputs"):
        plan_of("llama", {**SHARED, "permutation.side": "output"})
    assert by_ending(plan_of("llama", {**SHARED, "permutation.side": "both"}), "k_proj").sides == ("input", "output")


def test_both_sides_are_permuted_where_both_can_gain() -> None:
    for structure, sides in {"diag": ("input", "output"), "block": ("input", "output"), "nm": ("input",)}.items():
        for side in ("auto", "both"):
            layers = plan_of("llama", {"permutation.side": side, "sparsity": 0.5, "structure": structure}).layers
            assert {layer.sides for layer in layers} == {sides}, "rows of N:M are N:M in any order"


def test_one_side_is_the_smaller_one() -> None:
    layers = plan_of("llama", {"permutation.side": "smaller"}).layers
    assert {layer.name.rpartition(".")[2]: layer.sides for layer in layers} == {
        **dict.fromkeys(("q_proj", "o_proj", "gate_proj", "up_proj"), ("input",)),
        **dict.fromkeys(("k_proj", "v_proj", "down_proj"), ("output",)),
    }
    assert by_ending(plan_of("llama", {**SHARED, "permutation.side": "smaller"}), "k_proj").sides == ("input",)
    assert {layer.sides for layer in plan_of("llama", {"permutation.side": "smaller", "structure": "nm"}).layers} == {
        ("input",)
    }


@pytest.mark.parametrize("learner", ["soft", "straight-through"])
def test_matrices_are_trained_on_the_smaller_side_unless_both_are_asked_for(learner: str) -> None:
    auto, both = (plan_of("llama", {"permutation.learner": learner, "permutation.side": s}) for s in ("auto", "both"))
    for layer in auto.layers:
        assert layer.trained == ("input" if layer.out_features >= layer.in_features else "output",)
    assert all(layer.trained == layer.sides == ("input", "output") for layer in both.layers)
    assert auto.run_bytes(True, False) < both.run_bytes(True, False)
    assert all(layer.trained == layer.sides for layer in plan_of("llama", {"permutation.learner": "refined"}).layers)


def test_layers_without_entries_are_told() -> None:
    with pytest.raises(PadstError, match=r"a matrix \[0, 32\] has no entries"):
        plan_of("llama", {"targets": ("gate_proj",)}, intermediate_size=0)


def test_an_allocation_that_means_no_layer_is_refused(tmp_path) -> None:
    (tmp_path / "table.yaml").write_text("k_proj: 0.8\nv_prj: 0.7\n")
    with pytest.raises(PadstError, match=r"--allocation 'v_prj' matches no linear layer \(did you mean 'v_proj'\?\)"):
        plan_of("llama", {"allocation": str(tmp_path / "table.yaml")})
