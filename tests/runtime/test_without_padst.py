"""A program that does not import padst stops on a padst folder by every route, and opens the dense form as its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch
import transformers

from padst_cli.runtime.packing import write_dense

CHILD = """
import json, sys, torch, transformers
answers = []
cases, dense = json.loads(sys.argv[1])
for folder, opener in cases:
    try:
        getattr(transformers, opener).from_pretrained(folder)
        answers.append("loaded")
    except Exception as error:
        answers.append(type(error).__name__)
model = transformers.AutoModelForCausalLM.from_pretrained(dense)
logits = model(torch.tensor([[1, 2, 3]])).logits.detach()
torch.testing.assert_close(logits, torch.load(dense + "/expected.pt"), rtol=1e-4, atol=1e-5)
assert not any(name.startswith(("padst_cli", "padst_kernels")) for name in sys.modules)
print(json.dumps(answers))
"""


def test_plain_transformers_refuses_every_folder_and_opens_the_dense_form(folders, tiny, tmp_path):
    cases = []
    routes = {
        "gpt2": ["AutoModelForCausalLM", "AutoModel", "GPT2LMHeadModel", "AutoModelForSequenceClassification"],
        "vit": ["AutoModelForImageClassification", "AutoModel"],
        "bert": ["AutoModel", "AutoModelForMaskedLM"],
    }
    for family, openers in routes.items():
        for structure, form in (("diag", "packed"), ("unstructured", "training")):
            folder = folders(family, structure, form)
            model = transformers.AutoModelForCausalLM.from_pretrained(folder) if family == "gpt2" else None
            places = [folder]
            if model is not None:
                for name, size in (("copy", "5GB"), ("shards", "20KB")):
                    places.append(tmp_path / f"{form}-{name}")
                    model.save_pretrained(places[-1], max_shard_size=size)
            cases += [(str(place), opener) for place in places for opener in openers]
    dense = tmp_path / "dense"
    model = transformers.AutoModelForCausalLM.from_pretrained(folders("gpt2", "diag"))
    write_dense(model, dense)
    torch.save(tiny.first_output(model, {"input_ids": torch.tensor([[1, 2, 3]])}), dense / "expected.pt")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps([cases, str(dense)])],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    answers = json.loads(child.stdout.splitlines()[-1])
    assert len(answers) == len(cases) == 32
    assert [case for case, answer in zip(cases, answers, strict=True) if answer == "loaded"] == []
