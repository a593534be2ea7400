"""Starting a sparse model from a pretrained one: calibration, support, permutation, closed-form refit."""

from padst_cli.initialise.allocation import allocate
from padst_cli.initialise.calibrate import initialise
from padst_cli.initialise.start import LayerStart

__all__ = ["LayerStart", "allocate", "initialise"]
