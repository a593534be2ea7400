"""A tiny GPT-2 with everything around it that training needs: starts from magnitude masks, items, recipes."""

import copy

import pytest
import torch
from accelerate import Accelerator

from padst_cli.initialise.layer import opening
from padst_cli.initialise.start import LayerStart
from padst_cli.permutation.apply import random_permutation, to_structure
from padst_cli.plan import make_plan
from padst_cli.recipe import Recipe
from padst_cli.training.objective import build_objective
from padst_cli.training.swap import sparsify_modules
from padst_cli.training.trainer import train
from tests import models

VOCABULARY = 40
LENGTH = 12


class RandomWindows:
    """As many token windows as asked for, each a pure function of its number."""

    def __init__(self, count=24):
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index]}


class Bench:
    """Builds a run the way the pipeline does, small."""

    def __init__(self):
        self.dataset = RandomWindows()

    def recipe(self, **changes):
        base = {
            "sparsity": 0.75,
            "training.steps": 12,
            "training.batch_size": 4,
            "training.max_seq_length": LENGTH,
            "training.learning_rate": 1e-3,
            "training.log_every": 1,
            "training.warmup": 0.1,
            "support.every": 3,
            "support.fraction": 0.4,
            "permutation.deadline": 0.5,
            "permutation.learner": "soft",
        }
        return Recipe().updated({**base, **changes})

    def teacher(self, dropout=0.0, dtype=torch.float32):
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
        sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "num_attention_heads": 2}
        return models.build("gpt2", **sizes, **drops).to(dtype)

    def starts(self, model, plan, recipe):
        found = {}
        generator = torch.Generator().manual_seed(1)
        for layer in plan.layers:
            weight = model.get_submodule(layer.name).weight.detach()
            weight = weight.T if layer.transposed else weight
            perms = dict.fromkeys(("input", "output"))
            sizes = {"input": layer.in_features, "output": layer.out_features}
            for side in layer.sides:
                perms[side] = random_permutation(sizes[side], generator)
            scored = to_structure(weight, perms["input"], perms["output"])
            mask = opening(layer, recipe).project(scored.square())
            found[layer.name] = LayerStart(
                name=layer.name, structure=layer.structure, weight=torch.where(mask, scored, 0.0).float(), mask=mask,
                bias=model.get_submodule(layer.name).bias.detach(), perm_in=perms["input"],
                perm_out=perms["output"], error_mask=0.0, error=0.0, kept=0.0,
            )  # fmt: skip
        return found

    def student(self, recipe, dropout=0.0, dtype=torch.float32):
        teacher = self.teacher(0.0, dtype)
        student = self.teacher(dropout, dtype)
        student.load_state_dict(copy.deepcopy(teacher.state_dict()))
        plan = make_plan(teacher, recipe)
        sparsify_modules(student, self.starts(teacher, plan, recipe), plan, recipe, teacher)
        return teacher, student

    def train(self, recipe, *, dropout=0.0, dtype=torch.float32, student=None, **options):
        teacher, fresh = self.student(recipe, dropout, dtype)
        student = fresh if student is None else student
        objective = build_objective("causal-lm", recipe.training, teacher)
        result = train(student, objective, self.dataset, recipe, Accelerator(cpu=True), **options)
        return student, result


@pytest.fixture
def bench():
    return Bench()


@pytest.fixture
def events():
    """A list that is also an event callback through `.append`."""
    return []
