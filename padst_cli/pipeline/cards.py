"""The model cards of the folders that padst writes, from the figures that a run leaves behind."""

from __future__ import annotations

import shutil
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import PositiveInt
from yaml import YAMLError

from padst_cli.checkpoint.model_card import CardData, CardForm, model_card
from padst_cli.checkpoint.reader import Source, Task
from padst_cli.checkpoint.run_folder import RECIPE, RESULTS, RunMetric
from padst_cli.checkpoint.stored import read_stored
from padst_cli.checkpoint.writer import write_atomically
from padst_cli.errors import PadstError
from padst_cli.recipe import StructureName, load_recipe

CARD = "README.md"


@dataclass(frozen=True)
class RunFigures:
    """What a card is written from, of the figures that a run leaves behind (`SparsifyResult` says what they are)."""

    command: str
    train_data: str
    eval_data: str
    eval_digest: str
    environment: dict[str, str]
    task: Task
    structure: StructureName
    layers: int
    metric: RunMetric
    permutations: dict[str, int]
    dense_bytes: PositiveInt
    packed_bytes: PositiveInt
    sparsity_requested: float
    sparsity_achieved: float
    whole_model_density: float
    steps: int
    seconds: float
    tokens_or_images_seen: int
    kl_to_dense: float | None = None


FIGURES = frozenset(each.name for each in fields(RunFigures) if each.default is MISSING)
"""Those that a card cannot be written without."""


def write_run_card(source: Source, folder: Path, results: dict[str, Any], recipe_yaml: str) -> None:
    """The card of a run's own folder; `source` is the dense base model, `results` what goes into `results.json`."""
    write_atomically(folder / CARD, model_card(_card_data(source, results, recipe_yaml, "training", None)))


def run_results(trained: Source) -> RunFigures:
    """The figures that `sparsify` left in a folder; raises `PadstError` for damaged ones, or where a file is gone."""
    for name in (RECIPE, RESULTS):
        if not (trained.folder / name).is_file():
            raise PadstError(
                f"'{trained.name}' lacks {name}, which `padst sparsify` writes; export the folder that it wrote"
            )
    complaint, advice = f"'{trained.name}' has a damaged {RESULTS}", "take back the one that `padst sparsify` wrote"
    return read_stored(trained.folder / RESULTS, RunFigures, complaint, advice)


def write_export_card(trained: Source, folder: Path, exported: dict[str, Any], form: str) -> None:
    """The card of an export, with recipe and figures of the run beside it so that the export can be traced back.

    Raises `PadstError` as `run_results` does.
    """
    results = asdict(run_results(trained))
    recipe_yaml = (trained.folder / RECIPE).read_text(encoding="utf-8")
    for name in (RECIPE, RESULTS):
        shutil.copyfile(trained.folder / name, folder / name)
    base = load_recipe(str(trained.folder / RECIPE)).model or trained.name
    data = _card_data(trained, results, recipe_yaml, "packed" if form == "packed" else "dense", exported, base)
    write_atomically(folder / CARD, model_card(data))


def _card_data(
    source: Source,
    results: dict[str, Any],
    recipe_yaml: str,
    form: CardForm,
    exported: dict[str, Any] | None,
    base: str | None = None,
) -> CardData:
    return CardData(
        result=results,
        base_model=base or source.name,
        architecture=source.architecture,
        form=form,
        recipe_yaml=recipe_yaml,
        command=results["command"],
        base_license=_licence(source.folder),
        train_data=results["train_data"],
        eval_data=results["eval_data"],
        eval_digest=results["eval_digest"],
        environment=results["environment"],
        export=exported,
    )


def _licence(folder: Path) -> str | None:
    """The licence that a model folder's own card names, None where it names none or cannot be read."""
    from huggingface_hub import metadata_load

    card = folder / CARD
    try:
        metadata = metadata_load(card) if card.is_file() else None
    except (ValueError, YAMLError):
        return None
    licence = (metadata or {}).get("license")
    return licence if isinstance(licence, str) else None
