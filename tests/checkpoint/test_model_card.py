"""The model card: valid front matter for the hub, honest figures, loading that fits the task and the form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from padst_cli.checkpoint.model_card import CardData, duration, figure, metric_name, model_card, size, verdict
from padst_cli.recipe import Recipe

RESULT: dict[str, Any] = {
    "output": "out",
    "task": "causal-lm",
    "structure": "diag",
    "sparsity_requested": 0.9,
    "sparsity_achieved": 0.9004,
    "whole_model_density": 0.38,
    "layers": 48,
    "steps": 150,
    "seconds": 192.0,
    "tokens_or_images_seen": 307_200,
    "metric": {"name": "perplexity", "dense": 17.02, "dense_finetuned": 16.41, "initial": 161.3, "final": 21.37},
    "kl_to_dense": 0.312,
    "permutations": {"learned": 16, "hardened_by_penalty": 10, "hardened_at_deadline": 6, "moved_from_start": 12},
    "dense_bytes": 14_720_512,
    "packed_bytes": 3_214_080,
}

DATA = CardData(
    result=RESULT,
    base_model="gpt2",
    architecture="GPT2LMHeadModel",
    form="packed",
    recipe_yaml=Recipe().to_yaml(),
    command="padst sparsify gpt2 --structure diag --sparsity 0.9",
    base_license="mit",
    train_data="hf:Salesforce/wikitext@wikitext-103-raw-v1",
    eval_data="hf:Salesforce/wikitext@wikitext-103-raw-v1",
    eval_digest="0123456789abcdef" * 4,
    environment={"hardware": "a processor, 2 CPU cores", "mixed_precision": "no", "torch": "2.13.0"},
)


def _front(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    front = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(front, dict)
    return front


def _changed(data: CardData = DATA, **result: Any) -> CardData:
    return replace(data, result={**data.result, **result})


def test_front_matter_is_what_the_hub_reads() -> None:
    card = ModelCard(model_card(DATA))
    assert card.data.base_model == "gpt2"
    assert card.data.library_name == "transformers"
    assert card.data.license == "mit"
    assert card.data.pipeline_tag == "text-generation"
    assert {"padst", "sparse", "diag"} <= set(card.data.tags)
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("perplexity", 21.37)
    assert result.dataset_type == "Salesforce/wikitext@wikitext-103-raw-v1"


def test_card_says_how_it_was_made_and_how_good_it_is() -> None:
    text = model_card(DATA)
    for words in (
        DATA.command,
        "dense, as it came | 17.02",
        "dense, fine-tuned for 150 steps (control) | 16.41",
        "sparse, before training | 161.3",
        "**sparse, after 150 steps** | 21.37",
        "0.9000 requested, 0.9004 achieved",
        "14.7 MB dense, 3.21 MB packed (4.58 times smaller)",
        "a processor, 2 CPU cores",
        "- mixed precision: no",
        "sha256 0123456789abcdef",
        "delta: 0.22",
        "25.6 % worse",
        "30.2 % worse",
        "307,200 tokens",
        "3 min 12 s",
        "16 permutations learned on the way (12 entries moved",
    ):
        assert words in text, words


def test_same_data_gives_the_same_card() -> None:
    assert model_card(DATA) == model_card(replace(DATA))


def test_no_path_of_a_disk_is_told(tmp_path: Path) -> None:
    text = model_card(replace(DATA, base_model=str(tmp_path), train_data=str(tmp_path / "a.txt"), eval_data="./b.txt"))
    assert str(tmp_path) not in text
    assert "base_model" not in _front(text)
    assert f"`{tmp_path.name}`" in text
    assert "a.txt" in text
    assert "b.txt" in text


@pytest.mark.parametrize(
    ("task", "auto", "tag"),
    [
        ("causal-lm", "AutoModelForCausalLM", "text-generation"),
        ("masked-lm", "AutoModelForMaskedLM", "fill-mask"),
        ("image-classification", "AutoModelForImageClassification", "image-classification"),
        ("encoder", "AutoModel", "feature-extraction"),
    ],
)
def test_loading_fits_the_task(task: str, auto: str, tag: str) -> None:
    text = model_card(_changed(task=task))
    code = text.split("```python\n")[1].split("```")[0]
    assert f"{auto}.from_pretrained" in code
    assert code.index("import padst_cli") < code.index("from transformers")
    compile(code, "card", "exec")
    assert _front(text)["pipeline_tag"] == tag


def test_dense_form_needs_no_padst() -> None:
    text = model_card(replace(DATA, form="dense"))
    assert "import padst_cli" not in text
    assert "loads without padst" in text


def test_export_figures_replace_those_of_the_run() -> None:
    export = {
        "dense_bytes": 8_000_000,
        "packed_bytes": 1_000_000,
        "max_abs_logit_error": 3e-6,
        "value_dtype": "float16",
    }
    text = model_card(replace(DATA, export=export))
    assert "8 MB dense, 1 MB packed (8.00 times smaller)" in text
    assert "3.0e-06 (values in float16)" in text


def test_unstructured_has_no_packed_size() -> None:
    text = model_card(_changed(replace(DATA, form="training"), structure="unstructured"))
    assert "no packed form" in text
    assert "times smaller" not in text


def test_unknown_licence_and_data_are_left_out_of_the_front_matter() -> None:
    front = _front(model_card(replace(DATA, base_license=None, eval_data=None, train_data=None)))
    assert "license" not in front
    assert "model-index" not in front
    assert "licence was not stated" in model_card(replace(DATA, base_license=None))


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (
            {"name": "perplexity", "dense": 20.0, "final": 15.0},
            "has 20, so the sparse one is 25.0 % better",
        ),
        ({"name": "perplexity", "dense": 10.0, "final": 35.0}, "3.5 times as high (worse)"),
        (
            {"name": "top1", "dense": 0.7, "final": 0.65},
            "has 0.7, so the sparse one is 5.0 points worse",
        ),
        (
            {"name": "top1", "dense": 0.6, "final": 0.65, "dense_finetuned": 0.7},
            "many steps has 0.7, so the sparse one is 5.0",
        ),
        ({"name": "top1", "dense": 0.65, "final": 0.65}, "the dense model has the same, 0.65"),
        (
            {"name": "feature_error", "dense": 0.0, "final": 0.2},
            "relative feature error of 0.2 against",
        ),
        ({"name": "perplexity", "dense": None, "final": 3.0}, "the dense model was not measured"),
        ({"name": "perplexity", "dense": 3.0, "final": None}, "was not measured"),
    ],
)
def test_verdict_is_honest(metric: dict[str, Any], words: str) -> None:
    assert words in verdict({"metric": {"initial": None, "dense_finetuned": None, **metric}, "steps": 10})


def test_verdict_says_when_there_was_no_control() -> None:
    metric = {**RESULT["metric"], "dense_finetuned": None}
    assert "No dense control was run" in verdict({"metric": metric, "steps": 10})
    assert "No dense control was run" not in verdict({"metric": metric, "steps": 0})


def test_figures_read_well() -> None:
    assert [figure(value) for value in (17.02, 1234.5, 123456.0, 0.00001, 0.0, None)] == [
        "17.02",
        "1234",
        "123,456",
        "1.000e-05",
        "0",
        "not measured",
    ]
    assert [size(count) for count in (12, 1500, 14_720_512, 123_400_000, 7e9, None)] == [
        "12 B",
        "1.5 kB",
        "14.7 MB",
        "123 MB",
        "7 GB",
        "not measured",
    ]
    assert [duration(seconds) for seconds in (1.23, 42.2, 134.2, 7384)] == ["1.2 s", "42 s", "2 min 14 s", "2 h 3 min"]
    assert metric_name("top1") == "top-1 accuracy"
    assert metric_name("acc_norm") == "acc norm"
