"""What training minimises, against plain formulas."""

import pytest
import torch
import torch.nn.functional as F

from padst_cli.errors import PadstError
from padst_cli.recipe import TrainingRecipe
from padst_cli.training.objective import (
    IGNORED,
    MaskedLM,
    attention_distance,
    build_objective,
    hidden_distance,
    relative_error,
)
from tests import models


@pytest.fixture
def ids():
    return torch.randint(1, 40, (3, 12), generator=torch.Generator().manual_seed(2))


def bert(seed, family="bert-mlm"):
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    return models.build(family, seed, **sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def test_causal_lm_mixes_cross_entropy_with_the_divergence_from_the_teacher(bench, ids):
    teacher, student = bench.teacher(), bench.teacher()
    with torch.no_grad():
        student.transformer.wte.weight.mul_(1.5)
    recipe = TrainingRecipe(distill_weight=0.3, distill_temperature=2.0)
    loss, terms = build_objective("causal-lm", recipe, teacher)(student, {"input_ids": ids})
    ours, theirs = student(ids).logits, teacher(ids).logits
    task = student(ids, labels=ids).loss
    p = (theirs / 2).softmax(-1)
    divergence = 4 * (p * (p.log() - (ours / 2).log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(terms["task"], task)
    torch.testing.assert_close(terms["distill"], divergence)
    torch.testing.assert_close(loss, 0.7 * task + 0.3 * divergence)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())


def test_without_distillation_only_the_task_is_left(bench, ids):
    objective = build_objective("causal-lm", TrainingRecipe(distill=False), bench.teacher())
    loss, terms = objective(bench.teacher(), {"input_ids": ids})
    assert objective.teacher is None
    assert set(terms) == {"task"}
    torch.testing.assert_close(loss.detach(), terms["task"])


def test_a_student_equal_to_its_teacher_is_at_no_distance(bench, ids):
    _, terms = build_objective("causal-lm", TrainingRecipe(), bench.teacher())(bench.teacher(), {"input_ids": ids})
    assert terms["distill"].abs() < 1e-6


def test_masking_depends_on_seed_step_and_row_and_not_on_how_the_batch_is_cut(ids):
    objective = MaskedLM(TrainingRecipe(), None, mask_id=39, vocabulary=40)
    whole = objective.prepare({"input_ids": ids}, 5, 7, 0)
    part = objective.prepare({"input_ids": ids[1:]}, 5, 7, 1)
    assert torch.equal(whole["input_ids"][1:], part["input_ids"])
    assert torch.equal(whole["labels"][1:], part["labels"])
    assert not torch.equal(whole["labels"], objective.prepare({"input_ids": ids}, 5, 8, 0)["labels"])
    chosen = whole["labels"] != IGNORED
    assert chosen.sum(1).tolist() == [2, 2, 2]
    assert torch.equal(whole["labels"][chosen], ids[chosen])
    assert torch.equal(whole["input_ids"][~chosen], ids[~chosen])


def test_what_frames_a_text_is_never_masked():
    ids = torch.randint(5, 30, (200, 16))
    objective = build_objective("masked-lm", TrainingRecipe(), None, mask_id=39, vocabulary=30, frame=(1, 2))
    batch = objective.prepare({"input_ids": ids}, 0, 0, 0)
    chosen = batch["labels"] != IGNORED
    assert torch.equal(batch["input_ids"][:, [0, 14, 15]], ids[:, [0, 14, 15]])
    assert chosen.sum(1).tolist() == [2] * 200
    assert chosen.any(0).tolist() == [False, *[True] * 13, False, False]


def test_masked_tokens_mostly_read_the_mask_token():
    ids = torch.randint(1, 30, (8, 400))
    batch = MaskedLM(TrainingRecipe(), None, mask_id=39, vocabulary=30).prepare({"input_ids": ids}, 0, 0, 0)
    chosen = batch["labels"] != IGNORED
    share = (batch["input_ids"][chosen] == 39).float().mean().item()
    assert share == pytest.approx(0.8, abs=0.06)


def test_masked_lm_loss_is_that_of_the_masked_positions(ids):
    student = bert(0)
    objective = build_objective("masked-lm", TrainingRecipe(), bert(1), mask_id=39, vocabulary=40)
    batch = objective.prepare({"input_ids": ids}, 0, 0, 0)
    _, terms = objective(student, batch)
    chosen = batch["labels"] != IGNORED
    expected = F.cross_entropy(student(batch["input_ids"]).logits[chosen], ids[chosen])
    torch.testing.assert_close(terms["task"], expected.detach())
    assert terms["distill"] > 0


def test_images_without_labels_learn_from_the_teacher_alone():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}
    teacher, student = (models.build("vit", seed, **sizes) for seed in (0, 1))
    objective = build_objective("image-classification", TrainingRecipe(), teacher)
    pixels = torch.randn(2, 3, 8, 8)
    loss, terms = objective(student, {"pixel_values": pixels})
    assert set(terms) == {"distill"}
    _, with_labels = objective(student, {"pixel_values": pixels, "labels": torch.tensor([1, 3])})
    assert set(with_labels) == {"task", "distill"}
    torch.testing.assert_close(loss.detach(), with_labels["distill"])
    alone = build_objective("image-classification", TrainingRecipe(distill=False), None)
    with pytest.raises(PadstError, match="no labels"):
        alone(student, {"pixel_values": pixels})


def test_an_encoder_matches_every_hidden_state(ids):
    teacher, student = bert(0, "bert"), bert(1, "bert")
    loss, terms = build_objective("encoder", TrainingRecipe(), teacher)(student, {"input_ids": ids})
    ours = student(ids, output_hidden_states=True)
    theirs = teacher(ids, output_hidden_states=True)
    last = relative_error(ours.last_hidden_state, theirs.last_hidden_state)
    torch.testing.assert_close(terms["last_hidden"], last.detach())
    loss.backward()
    assert student.encoder.layer[0].output.dense.weight.grad.abs().sum() > 0
    same, _ = build_objective("encoder", TrainingRecipe(), teacher)(teacher, {"input_ids": ids})
    assert same == 0.0


def test_relative_error_is_blind_to_scale():
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(relative_error(a, b), relative_error(10 * a, 10 * b))
    assert relative_error(torch.zeros_like(b), b).item() == pytest.approx(1.0)


def test_what_cannot_be_learned_is_refused(bench):
    with pytest.raises(PadstError, match="distillation"):
        build_objective("encoder", TrainingRecipe(distill=False), bench.teacher())
    with pytest.raises(PadstError, match="mask token"):
        build_objective("masked-lm", TrainingRecipe(), None)


@pytest.mark.parametrize("task", ["causal-lm", "encoder"])
def test_attention_maps_are_compared_where_they_count(bench, ids, task):
    teacher, student = (bench.teacher(), bench.teacher()) if task == "causal-lm" else (bert(0, "bert"), bert(1, "bert"))
    with torch.no_grad():
        models.blur(student, 0.1, "weight")
    plain, without = build_objective(task, TrainingRecipe(), teacher)(student, {"input_ids": ids})
    recipe = TrainingRecipe(distill_attention=3.0)
    loss, terms = build_objective(task, recipe, teacher)(student, {"input_ids": ids})
    maps = [model(ids, output_attentions=True).attentions for model in (student, teacher)]
    expected = sum(((one - other) ** 2).sum(-1).mean() for one, other in zip(*maps, strict=True)) / len(maps[0])
    assert expected > 1e-4
    torch.testing.assert_close(terms["attention"], expected)
    torch.testing.assert_close(loss, plain + 3.0 * expected)
    assert "attention" not in without
    loss.backward()
    assert set(build_objective(task, recipe, teacher)(teacher, {"input_ids": ids})[1]) == set(terms)


def test_hidden_states_are_compared_where_they_count(bench, ids):
    teacher, student = bench.teacher(), bench.teacher()
    with torch.no_grad():
        models.blur(student, 0.1, "weight")
    plain, without = build_objective("causal-lm", TrainingRecipe(), teacher)(student, {"input_ids": ids})
    objective = build_objective("causal-lm", TrainingRecipe(distill_hidden=3.0), teacher)
    loss, terms = objective(student, {"input_ids": ids})
    states = [model(ids, output_hidden_states=True).hidden_states[1:] for model in (student, teacher)]
    expected = sum(((a - b) ** 2).sum(-1).div((b**2).sum(-1)).mean() for a, b in zip(*states, strict=True))
    expected = expected / len(states[0])
    assert expected > 1e-4
    torch.testing.assert_close(terms["hidden"], expected)
    torch.testing.assert_close(loss, plain + 3.0 * expected)
    assert "hidden" not in without
    loss.backward()
    assert objective(teacher, {"input_ids": ids})[1]["hidden"].item() == pytest.approx(0.0, abs=1e-12)


def test_hidden_states_that_are_not_there_are_missed():
    with pytest.raises(PadstError, match=r"leave training\.distill_hidden out"):
        hidden_distance(object(), object())
    with pytest.raises(ValueError, match="distill_hidden compares with the dense model: it needs distill"):
        TrainingRecipe(distill=False, distill_hidden=1.0)


def test_attention_maps_that_are_not_there_are_missed():
    with pytest.raises(PadstError, match=r"leave training\.distill_attention out"):
        attention_distance(object(), object())
    with pytest.raises(ValueError, match="it needs distill"):
        TrainingRecipe(distill=False, distill_attention=1.0)


def test_a_model_without_plain_attention_is_named(bench, ids, monkeypatch):
    def refuse(_, name):
        raise ValueError(f"no {name} here")

    student = bench.teacher()
    student.set_attn_implementation("sdpa")
    monkeypatch.setattr(type(student), "set_attn_implementation", refuse)
    objective = build_objective("causal-lm", TrainingRecipe(distill_attention=1.0), bench.teacher())
    with pytest.raises(PadstError, match=r"GPT2LMHeadModel does not take \(no eager here\)"):
        objective(student, {"input_ids": ids})
