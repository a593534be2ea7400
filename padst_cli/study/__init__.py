"""Many runs against each other: a grid of `sparsify`, resumable, with what it shows and how sure that is."""

from padst_cli.study.cells import Cell, expand
from padst_cli.study.recipe import StudyRecipe, load_study
from padst_cli.study.run import StudyResult, study

__all__ = ["Cell", "StudyRecipe", "StudyResult", "expand", "load_study", "study"]
