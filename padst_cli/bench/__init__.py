"""How fast sparse layers and the sparse model run against dense ones: the same process, threads, inputs and moment.

The method: runs of dense and sparse alternate, so that a machine that slows down slows both; figures are medians of
the runs with their interquartile range; the weights of a layer are rotated through copies that together exceed the
caches, as the layers of a model do; dense layers are `torch.nn.functional.linear` on contiguous weights. What is
called resident is counted from the tensors that are alive after the runs, kernels' prepared copies included.
"""

from padst_cli.bench.chart import speedup_chart
from padst_cli.bench.random_model import random_sparse
from padst_cli.bench.result import BenchResult, FasterDense, LayerRow, ModelRates, Roofline, TrainRates, TrainRow
from padst_cli.bench.run import DEFAULT_TOKENS, bench

__all__ = [
    "DEFAULT_TOKENS",
    "BenchResult",
    "FasterDense",
    "LayerRow",
    "ModelRates",
    "Roofline",
    "TrainRates",
    "TrainRow",
    "bench",
    "random_sparse",
    "speedup_chart",
]
