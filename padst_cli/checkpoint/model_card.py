"""The model card (README.md) of a folder that padst writes: what the model is, how good, how to load it, its making.

The words for a run's figures live here too, so that the card and the report say the same thing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

CardForm = Literal["training", "packed", "dense"]

HIGHER_IS_BETTER: Final = frozenset({"top1", "top5"})
METRIC_NAMES: Final = {
    "perplexity": "perplexity",
    "word_perplexity": "word perplexity",
    "masked_perplexity": "masked-token perplexity",
    "bits_per_char": "bits per character",
    "kl_to_dense": "KL divergence from the dense model",
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "feature_error": "relative feature error",
}
STRUCTURE_NAMES: Final = {
    "diag": "diagonals",
    "nm": "N:M groups",
    "block": "blocks",
    "unstructured": "an unstructured mask (a control: trained, never packed)",
}
_AUTO_CLASSES: Final = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "image-classification": "AutoModelForImageClassification",
    "encoder": "AutoModel",
}
_PIPELINE_TAGS: Final = {
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "image-classification": "image-classification",
    "encoder": "feature-extraction",
}
_TASK_NAMES: Final = {
    "causal-lm": "causal language modelling",
    "masked-lm": "masked language modelling",
    "image-classification": "image classification",
    "encoder": "features (an encoder without a head)",
}
ITEMS: Final = {"causal-lm": "tokens", "masked-lm": "tokens", "image-classification": "images"}
_FORMS: Final = {
    "training": "in padst's training form: float32 values and each sparse layer's layout, ready for `padst export`",
    "packed": "packed: only the kept weights, their layout and the permutations are stored",
    "dense": "as an ordinary dense checkpoint: zeros stored, permutations multiplied in; it loads without padst",
}


@dataclass(frozen=True)
class CardData:
    """What a model card is written from.

    `result` is the JSON of `padst sparsify`; `base_model` a hub id or a folder, `architecture` the transformers class;
    `form` says what lies in the folder. `base_license` is the base model's licence where it is known (SPDX, lower
    case). `train_data` and `eval_data` name the data, `eval_digest` is the sha256 of the held-out part. `environment`
    maps hardware and versions to what they were. `export` is the JSON of `padst export` for an exported folder.
    """

    result: Mapping[str, Any]
    base_model: str
    architecture: str
    form: CardForm
    recipe_yaml: str
    command: str
    base_license: str | None = None
    train_data: str | None = None
    eval_data: str | None = None
    eval_digest: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    export: Mapping[str, Any] | None = None


def metric_name(name: str) -> str:
    """A metric's name in words, the name itself where it has none."""
    return METRIC_NAMES.get(name, name.replace("_", " "))


def figure(value: float | None) -> str:
    """A figure with four significant digits and no exponent where that reads well; `not measured` for None."""
    if value is None:
        return "not measured"
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3e}"
    digits = f"{value:.4g}"
    return digits if "e" not in digits else f"{value:,.0f}"


def size(count: float | None) -> str:
    """Bytes in decimal units with three significant digits; `not measured` for None."""
    if count is None:
        return "not measured"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"


def duration(seconds: float) -> str:
    """Seconds in words of the two largest units, for example `3 min 12 s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def short_name(name: str) -> str:
    """A hub id or data spec as it is; of a local path only the last part, so that no card tells of somebody's disk."""
    return Path(name).name if name.startswith(("/", ".", "~")) or Path(name).exists() else name


def verdict(result: Mapping[str, Any]) -> str:
    """What the metric says, in plain sentences: against the dense model, as it came and fine-tuned as long."""
    metric = result["metric"]
    name, final = metric_name(metric["name"]), metric["final"]
    if final is None:
        return f"The {name} of the final sparse model was not measured."
    sentences = [f"The sparse model reaches {_article(name)} {name} of {figure(final)}"]
    if metric["name"] == "feature_error":
        return f"{sentences[0]} against the dense model's features (0 would be exact)."
    sentences[0] += f"; {_against(metric['name'], final, metric['dense'], 'the dense model')}."
    tuned = metric.get("dense_finetuned")
    if tuned is not None:
        comparison = _against(metric["name"], final, tuned, "the dense model fine-tuned for as many steps")
        sentences.append(f"{comparison[0].upper()}{comparison[1:]}.")
    elif result.get("steps", 0) > 0:
        sentences.append(
            "No dense control was run, so how much of the difference fine-tuning alone would make is not known."
        )
    return " ".join(sentences)


def _against(metric: str, value: float, reference: float | None, who: str) -> str:
    if reference is None:
        return f"{who} was not measured"
    gap = value - reference
    if abs(gap) <= 1e-9 * max(abs(reference), 1e-12):
        return f"{who} has the same, {figure(reference)}"
    better = (gap > 0) == (metric in HIGHER_IS_BETTER)
    if metric in HIGHER_IS_BETTER:
        amount = f"{abs(gap) * 100:.1f} points"
    else:
        if reference and value / reference >= 2:
            return (
                f"{who} has {figure(reference)}, so the sparse one's is {value / reference:.1f} times as high (worse)"
            )
        amount = f"{abs(gap) / abs(reference) * 100:.1f} %" if reference else figure(abs(gap))
    return f"{who} has {figure(reference)}, so the sparse one is {amount} {'better' if better else 'worse'}"


def _article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


def model_card(data: CardData) -> str:
    """The text of README.md: YAML front matter for the hub, then the card."""
    name = short_name(data.base_model)
    result = data.result
    title = f"{name}, {result['sparsity_achieved'] * 100:.0f} % sparse ({result['structure']})"
    sections = [
        f"---\n{_front_matter(data, title)}\n---\n",
        f"# {title}\n",
        _what_it_is(data, name),
        "## Figures\n",
        verdict(result) + "\n",
        _metrics_table(data),
        _sizes(data),
        "## Loading\n",
        _loading(data),
        "## How it was made\n",
        _making(data),
        "## Limits\n",
        _limits(data),
    ]
    return "\n".join(section for section in sections if section)


def _front_matter(data: CardData, title: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    metric = data.result["metric"]
    scores = None
    if metric["final"] is not None and data.eval_data is not None:
        dataset = short_name(data.eval_data.removeprefix("hf:"))
        scores = [
            EvalResult(
                task_type=_PIPELINE_TAGS[data.result["task"]],
                dataset_type=dataset,
                dataset_name=dataset,
                metric_type=metric["name"],
                metric_value=round(metric["final"], 6),
                metric_name=f"{metric_name(metric['name'])}, held out",
            )
        ]
    card = ModelCardData(
        base_model=data.base_model if _is_hub_id(data.base_model) else None,
        library_name="transformers",
        pipeline_tag=_PIPELINE_TAGS[data.result["task"]],
        license=data.base_license,
        tags=["padst", "sparse", "structured-sparsity", data.result["structure"]],
        model_name=title if scores else None,
        eval_results=scores,
    )
    return card.to_yaml().strip()


def _what_it_is(data: CardData, name: str) -> str:
    result = data.result
    permuted = result["permutations"].get("learned", 0)
    moved = f"{result['permutations'].get('moved_from_start', 0):,} entries moved from where the assignment put them"
    through = f", {permuted} permutations learned on the way ({moved})" if permuted else ""
    sharing = result["permutations"].get("sharing_layers", 0)
    through += (
        f"; {sharing} layers share their input permutation with others that read the same input" if sharing else ""
    )
    text = (
        f"`{name}` ({data.architecture}, {_TASK_NAMES[result['task']]}) with {result['layers']} linear layers made "
        f"sparse{through}. Structure: {STRUCTURE_NAMES[result['structure']]}. Sparsity of these layers: "
        f"{result['sparsity_requested']:.4f} requested, {result['sparsity_achieved']:.4f} achieved; everything "
        f"else stays dense, so {result['whole_model_density'] * 100:.1f} % of the whole model's parameters are "
        "left. "
        "Made by padst after PA-DST ([arXiv 2510.14812](https://arxiv.org/abs/2510.14812)). "
        f"This folder holds the model {_FORMS[data.form]}."
    )
    return text + "\n"


def _metrics_table(data: CardData) -> str:
    metric = data.result["metric"]
    steps = data.result["steps"]
    rows = [("dense, as it came", metric["dense"])]
    if metric.get("dense_finetuned") is not None:
        rows.append((f"dense, fine-tuned for {steps} steps (control)", metric["dense_finetuned"]))
    rows.append(("sparse, before training", metric["initial"]))
    trained = f"sparse, after {steps} steps" if steps else "sparse, one shot (no training)"
    rows.append((f"**{trained}**", metric["final"]))
    lines = [f"| model | {metric_name(metric['name'])} |", "| --- | ---: |"]
    lines += [f"| {label} | {figure(value)} |" for label, value in rows]
    where = f"Held-out data: {short_name(data.eval_data)}" if data.eval_data else "Held-out data"
    if data.eval_digest:
        where += f" (sha256 {data.eval_digest[:16]})"
    direction = "higher" if metric["name"] in HIGHER_IS_BETTER else "lower"
    notes = [f"{where}; {direction} is better."]
    if data.result.get("kl_to_dense") is not None:
        notes.append(f"KL divergence from the dense model's predictions: {figure(data.result['kl_to_dense'])} nats.")
    return "\n".join(lines) + "\n\n" + " ".join(notes) + "\n"


def _sizes(data: CardData) -> str:
    source = data.export or data.result
    dense, packed = source["dense_bytes"], source["packed_bytes"]
    lines = [f"Whole model: {size(dense)} dense, {size(packed)} packed ({dense / packed:.2f} times smaller)."]
    if data.result["structure"] == "unstructured":
        lines = [f"Whole model: {size(dense)} dense; an unstructured mask has no packed form."]
    if data.export and data.export.get("max_abs_logit_error") is not None:
        lines.append(
            f"Largest difference between this folder's logits and the trained model's, on real input: "
            f"{data.export['max_abs_logit_error']:.1e} (values in {data.export.get('value_dtype', 'float32')})."
        )
    return " ".join(lines) + "\n"


def _loading(data: CardData) -> str:
    auto = _AUTO_CLASSES[data.result["task"]]
    first = "" if data.form == "dense" else "import padst_cli  # makes the padst format known to transformers\n"
    code = f'```python\n{first}from transformers import {auto}\n\nmodel = {auto}.from_pretrained("PATH_OR_REPO")\n```\n'
    if data.form == "dense":
        return code
    return (
        "With padst installed:\n\n"
        + code
        + "\nWithout the import transformers stops with an error; it does not run on random weights. "
        "`padst export --format dense` writes a checkpoint that loads anywhere.\n"
    )


def _making(data: CardData) -> str:
    result = data.result
    seen = f"{result['tokens_or_images_seen']:,} {ITEMS.get(result['task'], 'tokens or images')}"
    facts = [f"- {result['steps']} steps, {seen}, {duration(result['seconds'])}"]
    if data.train_data:
        facts.append(f"- trained and calibrated on {short_name(data.train_data)}")
    facts += [f"- {key.replace('_', ' ')}: {value}" for key, value in data.environment.items()]
    recipe = data.recipe_yaml.strip()
    return f"```console\n$ {data.command}\n```\n\n" + "\n".join(facts) + f"\n\nRecipe:\n\n```yaml\n{recipe}\n```\n"


def _limits(data: CardData) -> str:
    lines = [
        "- It was not compared on other tasks than the one above; what sparsity costs differs from task to task.",
        "- It keeps the base model's limits and biases, and may have gained some from the data it was fine-tuned on.",
    ]
    if data.form != "dense":
        lines.append(
            "- It runs through padst's own layers; a program that reads dense weights by itself cannot use this folder."
        )
    if data.base_license is None:
        lines.append("- The base model's licence was not stated in its files; it applies here too.")
    return "\n".join(lines) + "\n"


def _is_hub_id(name: str) -> bool:
    return not Path(name).exists() and name.count("/") <= 1 and not name.startswith((".", "/", "~"))
