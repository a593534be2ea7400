"""What padst carries with it: a small GPT-2 that reads Python source, and the command that trained it."""

from __future__ import annotations

from pathlib import Path

EMBEDDED_MODEL = Path(__file__).parent / "gpt2-python"
