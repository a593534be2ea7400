"""What the dense teacher said of each item, kept instead of asked for again."""

import pytest
import torch

from padst_cli.events import Message
from padst_cli.recipe import TrainingRecipe
from padst_cli.training import remembered
from padst_cli.training.objective import TEACHER_LOGITS, build_objective
from padst_cli.training.remembered import remember, worth_remembering
from padst_cli.training.trainer import make_accelerator
from tests import models


@pytest.fixture
def asked(monkeypatch):
    """How many items the teacher was asked about: in advance, and in training."""
    counts = {"ahead": 0}
    plain = remembered.Objective.ask

    def counting(self, batch):
        counts["ahead"] += len(batch["input_ids"])
        return plain(self, batch)

    monkeypatch.setattr(remembered.Objective, "ask", counting)
    return counts


def test_training_on_remembered_answers_is_training_on_asked_ones(bench, asked, events, monkeypatch):
    recipe = bench.recipe()
    assert worth_remembering(
        build_objective("causal-lm", recipe.training, bench.teacher()), len(bench.dataset), recipe.training
    )
    kept, result = bench.train(recipe, dtype=torch.float64, on_event=events.append)
    assert asked["ahead"] == len(bench.dataset) < result.items_seen
    assert any("to keep" in event.text for event in events if isinstance(event, Message))
    monkeypatch.setattr(remembered, "BUDGET_BYTES", 0)
    events.clear()
    fresh, _ = bench.train(recipe, dtype=torch.float64, on_event=events.append)
    assert not any("to keep" in event.text for event in events if isinstance(event, Message))
    for key, value in fresh.state_dict().items():
        torch.testing.assert_close(kept.state_dict()[key], value, rtol=0, atol=1e-9)


def test_the_answers_of_items_are_the_teachers_whatever_the_batches(bench):
    objective = build_objective("causal-lm", TrainingRecipe(), bench.teacher(dtype=torch.float64))
    found = remember(objective, bench.dataset, 3, make_accelerator("cpu"))
    last = len(bench.dataset) - 1
    ids = torch.stack([bench.dataset[number]["input_ids"] for number in (last, 0)])
    with torch.no_grad():
        expected = objective.teacher(ids).logits
    torch.testing.assert_close(found[[last, 0]], expected)
    loss, _ = objective(bench.teacher(dtype=torch.float64), {"input_ids": ids, TEACHER_LOGITS: expected})
    same, _ = objective(bench.teacher(dtype=torch.float64), {"input_ids": ids})
    torch.testing.assert_close(loss, same)


def test_what_changes_from_visit_to_visit_is_not_remembered(bench):
    often, seldom = TrainingRecipe(steps=100, batch_size=4), TrainingRecipe(steps=3, batch_size=4)
    teacher = bench.teacher()
    assert worth_remembering(build_objective("causal-lm", often, teacher), 200, often)
    assert not worth_remembering(build_objective("causal-lm", often, teacher), 201, often)
    assert not worth_remembering(build_objective("causal-lm", seldom, teacher), 200, seldom)
    for term in ("distill_attention", "distill_hidden"):
        inside = often.model_copy(update={term: 1.0})
        assert not worth_remembering(build_objective("causal-lm", inside, teacher), 4, inside)
    alone = often.model_copy(update={"distill": False})
    assert not worth_remembering(build_objective("causal-lm", alone, teacher), 4, alone)
    masked = build_objective("masked-lm", often, teacher, mask_id=3, vocabulary=20)
    assert not worth_remembering(masked, 4, often)
    assert not worth_remembering(build_objective("encoder", often, teacher), 4, often)
    vit = models.build("vit", 0, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8)
    assert worth_remembering(build_objective("image-classification", often, vit), 4, often)
