"""DynaDiag's gates: the start is unchanged, scores of inactive diagonals learn, folding changes nothing."""

import pytest
import torch

from padst_cli.errors import PadstError
from padst_cli.events import Step, SupportUpdated
from padst_cli.initialise.start import LayerStart
from padst_cli.permutation.apply import random_permutation, to_structure
from padst_cli.structures import StructureOptions, structure_class
from padst_cli.training.dynadiag import DiagonalGates, temperature_at
from padst_cli.training.sparse_linear import SparseLinear, sparse_layers


def start_of(name="diag", **options):
    generator = torch.Generator().manual_seed(4)
    structure = structure_class(name).for_density(40, 24, 0.25, StructureOptions(**options))
    dense = torch.randn(40, 24, generator=generator)
    perm = random_permutation(24, generator)
    scored = to_structure(dense, perm, None)
    mask = structure.project(scored.square())
    weight = torch.where(mask, 1.3 * scored, 0.0)
    return LayerStart("layer", structure, weight, mask, None, perm, None, 0.0, 0.0, 0.0), dense


def layer_of(start, dense):
    gates, latent = DiagonalGates.from_start(start, dense)
    return SparseLinear(start.structure, latent, start.mask, None, gates=gates)


@pytest.mark.parametrize("band", [1, 4])
def test_the_start_is_the_calibrated_one(band):
    start, dense = start_of(band=band)
    layer = layer_of(start, dense)
    torch.testing.assert_close(layer.effective_weight(), start.weight)
    assert torch.equal(layer.gates.support(), start.mask)
    gates = layer.gates.by_entry()
    torch.testing.assert_close(gates[start.mask], torch.full_like(gates[start.mask], 0.9))
    assert (gates[~start.mask] < 0.2).all()
    scored = to_structure(dense, start.perm_in, None)
    assert torch.equal(layer.weight[~start.mask], scored[~start.mask])


def test_scores_of_inactive_diagonals_get_the_gradient_their_gate_would_have():
    start, dense = start_of()
    layer = layer_of(start, dense)
    x = torch.randn(9, 24)
    target = torch.randn(9, 40)
    layer(x).sub(target).square().sum().backward()
    with torch.no_grad():
        error = 2 * (x @ layer.effective_weight().T - target)
    weight_gradient = error.T @ x
    by_diagonal = start.structure.unit_scores(weight_gradient * layer.weight.detach())
    soft = torch.softmax(layer.gates.scores.detach(), dim=1)
    through_gates = by_diagonal * start.structure.count
    expected = soft * (through_gates - (soft * through_gates).sum())
    torch.testing.assert_close(layer.gates.scores.grad, expected, rtol=1e-3, atol=1e-3)
    inactive = ~start.structure.units_of(start.mask)
    assert (layer.gates.scores.grad[inactive] != 0).all()


def test_latent_values_do_not_leak():
    start, dense = start_of()
    layer = layer_of(start, dense)
    clean = layer.effective_weight().detach()
    with torch.no_grad():
        layer.weight.masked_fill_(~layer.mask, float("nan"))
    assert torch.equal(layer.effective_weight(), clean)


def test_folding_changes_nothing_and_drops_latent_values():
    start, dense = start_of()
    layer = layer_of(start, dense)
    with torch.no_grad():
        layer.gates.scores += 0.1 * torch.randn(layer.gates.scores.shape)
    before = layer.effective_weight().detach()
    layer.fold_gates()
    assert layer.gates is None
    torch.testing.assert_close(layer.effective_weight(), before)
    assert not layer.weight[~layer.mask].any()


def test_the_temperature_falls_along_a_cosine_and_stays_at_its_end():
    assert temperature_at(0.0, 0.8, 1.0, 0.05) == pytest.approx(1.0)
    assert temperature_at(0.4, 0.8, 1.0, 0.05) == pytest.approx(0.525)
    assert temperature_at(0.8, 0.8, 1.0, 0.05) == pytest.approx(0.05)
    assert temperature_at(1.0, 0.8, 1.0, 0.05) == pytest.approx(0.05)


def test_only_the_ratio_of_the_temperatures_counts(bench):
    weights = []
    for temperatures in ((1.0, 0.05), (2.0, 0.1), (1.0, 0.1)):
        changes = {"support.method": "dynadiag", "support.dynadiag_temperature": temperatures}
        student, _ = bench.train(bench.recipe(**changes, **{"permutation.kind": "assignment"}))
        weights.append(torch.cat([layer.weight.detach().flatten() for layer in sparse_layers(student).values()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("until", [0.0, 0.75])
def test_a_run_begins_with_the_calibrated_weights(bench, events, until):
    kept = {"permutation.kind": "assignment"}
    changes = {"support.method": "dynadiag", "support.until": until, "support.dynadiag_temperature": (0.5, 0.1)}
    bench.train(bench.recipe(**changes, **kept), on_event=events.append)
    bench.train(bench.recipe(**{"support.method": "static"}, **kept), on_event=events.append)
    first = [event.loss for event in events if isinstance(event, Step) and event.step == 1]
    assert first[0] == pytest.approx(first[1], rel=1e-5)


def test_other_structures_are_refused():
    start, dense = start_of("block")
    with pytest.raises(PadstError, match="dynadiag"):
        DiagonalGates.from_start(start, dense)


def test_a_run_moves_diagonals_and_ends_with_plain_layers(bench, events):
    changes = {"training.steps": 40, "training.learning_rate": 0.01, "training.distill": False}
    recipe = bench.recipe(**changes, **{"support.method": "dynadiag", "permutation.kind": "assignment"})
    student, result = bench.train(recipe, on_event=events.append)
    assert any(isinstance(event, SupportUpdated) for event in events)
    assert result.support_moved > 0
    for layer in sparse_layers(student).values():
        assert layer.gates is None
        assert layer.structure.is_feasible(layer.structure.units_of(layer.mask))
        assert not layer.weight[~layer.mask].any()
