"""The direction of imports, held by an AST walk: the house of DESIGN.md as a table."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "padst_cli").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))

LOWEST = {"errors", "events"}
FORMATS = {
    "structures",
    "permutation",
    "document",
    "recipe",
    "checkpoint",
    "plan",
    "targets",
    "tying",
    "tracing",
    "data",
}
MIDDLE = {"initialise", "training", "evaluation", "runtime", "report"}

# part -> the parts of padst_cli that it may import (itself and the lowest tier always)
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "events": set(),
    "structures": set(),
    "permutation": {"structures"},
    "document": set(),
    "recipe": {"document"},
    "data": set(),
    "checkpoint": {"structures", "permutation"},
    "tying": set(),
    "tracing": set(),
    "targets": {"recipe", "tying"},
    "plan": {"structures", "recipe", "targets", "tracing", "tying"},
    "initialise": FORMATS,
    "training": FORMATS | {"initialise"},
    "evaluation": FORMATS,
    "runtime": FORMATS,
    "report": FORMATS,
    "hub": FORMATS | MIDDLE,
    "stopwatch": set(),
    "bench": FORMATS | {"runtime", "training", "evaluation", "report", "stopwatch"},
    "pipeline": FORMATS | MIDDLE | {"bench", "hub"},
    "quickstart": FORMATS | MIDDLE | {"pipeline", "bench", "assets"},
    "study": FORMATS | {"report", "assets", "pipeline"},
    "assets": {"data"},
    "console": set(),
    "commands": FORMATS | MIDDLE | {"pipeline", "bench", "quickstart", "study", "hub", "console"},
    "app": {"commands", "__init__"},
    "__main__": {"app"},
    "__init__": {"pipeline", "runtime"},
}
MAY_USE_KERNELS = {"runtime", "training", "bench"}
SCREEN = {"app", "console", "commands"}
NO_TORCH_AT_MODULE_LEVEL = {
    "app",
    "commands",
    "__init__",
    "__main__",
    "console",
    "errors",
    "events",
    "document",
    "recipe",
}


def part_of(path: Path) -> str:
    """`padst_cli/training/state.py` -> `training`, `padst_cli/plan.py` -> `plan`, `kernels/...` -> `kernels`."""
    relative = path.relative_to(ROOT)
    if relative.parts[0] == "kernels":
        return "kernels"
    return relative.parts[1] if len(relative.parts) > 2 else relative.stem


def imports(path: Path) -> list[tuple[str, bool]]:
    """(dotted module, whether at module level) of every import that runs; those under TYPE_CHECKING bind nothing."""
    found: list[tuple[str, bool]] = []

    def walk(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                if child.level:
                    assert path.is_relative_to(ROOT / "kernels"), f"{path}: relative import"
                    continue
                assert child.module is not None
                if child.module == "padst_cli":
                    found.extend((f"padst_cli.{alias.name}", top) for alias in child.names)
                else:
                    found.append((child.module, top))
            walk(child, top and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    walk(ast.parse(path.read_text(encoding="utf-8")), True)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_down(path: Path) -> None:
    part = part_of(path)
    for module, top in imports(path):
        root, _, rest = module.partition(".")
        if root == "padst_cli":
            assert part != "kernels", "padst_kernels imports padst_cli"
            target = rest.partition(".")[0]
            target = "__init__" if target.startswith("__") or not target else target
            assert target == part or target in LOWEST | MAY_IMPORT[part], f"{part} imports {module}"
        if root == "padst_kernels":
            assert part in MAY_USE_KERNELS | {"kernels"}, f"{part} imports {module}"
        if root in ("typer", "rich"):
            assert part in SCREEN, f"{part} imports {module}"
        if root == "triton":
            assert part == "kernels", f"{part} imports {module}"
            assert "gpu" in path.parts, f"{path.name} imports {module}"
        if top and root in ("torch", "transformers"):
            assert part not in NO_TORCH_AT_MODULE_LEVEL, f"{part} imports {module} at module level"
        assert root != "kernels", "the import name is padst_kernels"


def test_every_part_has_a_place_in_the_table() -> None:
    assert {part_of(path) for path in SOURCES} - {"kernels"} <= set(MAY_IMPORT)


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from padst_cli.app import app; from typer.testing import CliRunner; "
        "result = CliRunner().invoke(app, ['--help']); assert result.exit_code == 0, result.output; "
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'pydantic'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
