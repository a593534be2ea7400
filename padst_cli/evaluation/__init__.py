"""Held-out figures of dense and sparse models: perplexity, accuracy, feature error, lm-eval tasks."""

from padst_cli.evaluation.evaluate import HIGHER_IS_BETTER, METRICS, evaluate_model
from padst_cli.evaluation.result import EvalResult
from padst_cli.evaluation.tasks import check_tasks, run_tasks

__all__ = ["HIGHER_IS_BETTER", "METRICS", "EvalResult", "check_tasks", "evaluate_model", "run_tasks"]
