"""How much each weight of a layer matters: the score that permutation and support are chosen by."""

from __future__ import annotations

import torch
from torch import Tensor

from padst_cli.initialise.refit import damped_cholesky
from padst_cli.initialise.statistics import InputStatistics


def plain_saliency(weight: Tensor, statistics: InputStatistics) -> Tensor:
    """E = W^2 * diag(H), `[out, in]`: the output energy that each weight carries on its own.

    H is taken over the inputs of the already sparse model, which is what the layer will see. This is the score for
    weights that stay as they are (Wanda squared, Sun et al., 2024). Without any calibration input it is W^2.
    """
    score = weight.float().square()
    if statistics.tokens:
        score *= statistics.gram.diagonal() / statistics.tokens
    return score


def refit_saliency(weight: Tensor, aim: Tensor, statistics: InputStatistics, damping: float) -> Tensor:
    """E = V^2 / diag((H + lambda I)^-1), `[out, in]`: what the refit loses by leaving each weight out.

    V = (H + lambda I)^-1 (C W + lambda W), row by row, is the refit on the full support, so the weights that best make
    up for what earlier sparse layers changed; the rest is the optimal brain surgeon's saliency (Hassibi and Stork,
    1993), exact for the loss of one weight. lambda = damping * mean(diag H), as in the refit. `aim` is A = W C^T.
    Raises `PadstError` as `refit` does.
    """
    gram = statistics.gram
    ridge = damping * float(gram.diagonal().mean())
    if not statistics.tokens or ridge <= 0.0:
        return plain_saliency(weight, statistics)
    factor, ridge = damped_cholesky(gram, ridge)
    full = torch.cholesky_solve((aim + ridge * weight).T, factor).T
    alone = torch.cholesky_inverse(factor).diagonal()
    return full.square() / (alone * statistics.tokens)
