"""What an evaluation returns, and what each kind of model contributes to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

OnProgress = Callable[[int, int], None]
"""Called with (samples done, samples in all) after each batch."""


@dataclass(frozen=True)
class EvalResult:
    """The figures of one model on one corpus; the fields are the JSON keys of `padst eval`.

    `value` is the figure that `metric_name` names. KL divergences are means in nats. `samples` counts windows or
    images, `tokens` the scored ones. `digest` is the corpus's sha256, `batch_size` the samples that went through the
    model at once.
    """

    metric_name: str
    value: float
    kl_to_dense: float | None
    bits_per_char: float | None
    word_perplexity: float | None
    top5: float | None
    samples: int
    tokens: int | None
    context: int | None
    stride: int | None
    split: str
    seconds: float
    data: str
    digest: str
    batch_size: int

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, in order."""
        return asdict(self)


@dataclass(frozen=True)
class Measured:
    """What one pass over the data found: every figure by metric name, and how much was looked at.

    A figure that could not be taken (no labels, no reference model, text cut short) is absent from `figures`.
    """

    figures: Mapping[str, float]
    samples: int
    batch_size: int
    tokens: int | None = None
    context: int | None = None
    stride: int | None = None
