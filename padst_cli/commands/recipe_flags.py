"""The flags that change a recipe, said once and shared by `plan` and `sparsify`.

A flag that is not given leaves the recipe's value alone, so that `--recipe FILE` and flags compose.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from padst_cli.commands.common import Command, with_parameters

if TYPE_CHECKING:
    from padst_cli.recipe import Recipe


@dataclass(frozen=True)
class Flag:
    """One command-line flag: its spelling, the dotted recipe key that it sets, its type and its help."""

    option: str
    key: str
    type: Any
    help: str

    @property
    def parameter(self) -> str:
        """The keyword under which Typer passes the value."""
        return "flag_" + self.key.replace(".", "__")


FLAGS = (
    Flag("--structure", "structure", str, "diag, nm, block or unstructured."),
    Flag("--sparsity", "sparsity", float, "Share of zeros in the sparsified layers, between 0 and 1."),
    Flag("--data", "data", str, "Training and calibration data (see the README for the forms)."),
    Flag("--eval-data", "eval_data", str, "Held-out data; default: the held-out split of --data where it has one."),
    Flag("--steps", "training.steps", int, "Optimizer steps; 0 gives the one-shot result."),
    Flag("--batch-size", "training.batch_size", int, "Samples of one optimizer step, over all processes."),
    Flag("--accumulation", "training.accumulation", int, "Backward passes that share one optimizer step."),
    Flag("--max-seq-length", "training.max_seq_length", int, "Tokens of one training window."),
    Flag("--learning-rate", "training.learning_rate", float, "Peak learning rate of the weights; default: by task."),
    Flag("--block-size", "block_size", int, "Block edge: 16, 32 or 64."),
    Flag(
        "--block-rows",
        "block_rows",
        str,
        "even: equally many blocks in every block row; free: where the score is; auto: free from 8 block columns on.",
    ),
    Flag("--nm", "nm", str, "N:M, for example 2:4; default: chosen by the sparsity."),
    Flag("--band", "band", int, "Diagonals come in aligned runs of this many (16 for GPUs)."),
    Flag("--permutation", "permutation.kind", str, "learned, assignment, random or none."),
    Flag(
        "--learner",
        "permutation.learner",
        str,
        "How a learned permutation is learned: refined (before training), soft (as in the paper), projected or "
        "straight-through.",
    ),
    Flag(
        "--side",
        "permutation.side",
        str,
        "auto (both for diag and block, inputs for nm), both, smaller, input or output.",
    ),
    Flag(
        "--share-permutations/--no-share-permutations",
        "permutation.share",
        bool,
        "One input permutation for the layers that read the same input (query, key and value; gate and up).",
    ),
    Flag("--dst", "support.method", str, "How the support moves: rigl, set, mest, dynadiag or static."),
    Flag("--start-density", "support.start_density", float, "Begin at this density (1: dense) and fall to the target."),
    Flag("--density-until", "support.density_until", float, "Share of the run by which --start-density has fallen."),
    Flag("--allocation", "allocation", str, "uniform, erk, owl, error, or a YAML file of layer pattern: sparsity."),
    Flag(
        "--targets",
        "targets",
        list[str],
        "Only these layers: module name parts, re:EXPR, or `default` for those taken without it; may be repeated.",
    ),
    Flag("--ignore", "ignore", list[str], "Not these layers (module name parts or re:EXPR); may be repeated."),
    Flag(
        "--sensitivity",
        "calibration.sensitivity",
        float,
        "Power of the outputs' sensitivity in the choice of the support; 0: all outputs count alike.",
    ),
    Flag(
        "--refine-rounds",
        "calibration.refine_rounds",
        int,
        "Most rounds in which order and support are chosen anew for the refit's loss; 0: by saliency alone.",
    ),
    Flag("--refit/--no-refit", "calibration.refit", bool, "Refit surviving weights in closed form at the start."),
    Flag("--start", "calibration.start", str, "saliency (padst's own), or one shot by magnitude, wanda or sparsegpt."),
    Flag("--distill/--no-distill", "training.distill", bool, "Train against the dense model's outputs too."),
    Flag(
        "--distill-hidden",
        "training.distill_hidden",
        float,
        "Weight of the distance from the dense model's hidden states, for a model with a head; 0: none.",
    ),
    Flag(
        "--distill-attention",
        "training.distill_attention",
        float,
        "Weight of the distance from the dense model's attention maps; 0: none.",
    ),
    Flag("--augment/--no-augment", "training.augment", bool, "Crop and mirror images at random."),
    Flag("--average", "training.average", float, "Average the weights of this share of the steps, the last ones."),
    Flag("--dense-control/--no-dense-control", "dense_control", bool, "Also fine-tune the dense model as long."),
    Flag("--eval-samples", "eval_samples", int, "Evaluate on at most this many windows or images."),
    Flag("--eval-every", "training.eval_every", int, "Evaluate every so many steps; 0: at the end only."),
    Flag("--save-every", "training.save_every", int, "Save resumable state every so many steps."),
    Flag("--seed", "seed", int, "Seed of everything random."),
    Flag("--dtype", "dtype", str, "auto, float32 or bfloat16: what the training computes in."),
)


def recipe_flags(command: Command) -> Command:
    """Add all of `FLAGS` to a command, which receives those that were given as `changes`, by dotted recipe key."""
    keys = {flag.parameter: flag.key for flag in FLAGS}
    parameters = [
        inspect.Parameter(
            flag.parameter,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[flag.type | None, typer.Option(flag.option, help=flag.help, show_default=False)],
        )
        for flag in FLAGS
    ]

    def changes(values: dict[str, Any]) -> dict[str, Any]:
        given = {keys[name]: value for name, value in values.items() if value is not None}
        return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}

    return with_parameters(command, "changes", parameters, changes)


def build_recipe(model: str, recipe: str | None, changes: dict[str, Any]) -> Recipe:
    """The recipe of a run: the file or name given (or the defaults), with the flags laid over it."""
    from padst_cli.recipe import Recipe, load_recipe

    base = load_recipe(recipe) if recipe else Recipe()
    return base.updated({**changes, "model": model})
