"""JSON that padst wrote, read back: it may have been edited or damaged since, so every value is looked at."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from padst_cli.errors import PadstError

Form = TypeVar("Form")


def read_stored(path: Path, form: type[Form], complaint: str, advice: str) -> Form:
    """What a JSON file holds, as a `form`: a dataclass, whose types are what its values must have, or a mapping.

    Keys that `form` does not name are passed over. Raises `PadstError` in the words of `complaint`, which names the
    file, and `advice` where the file is gone or no JSON, a value is missing, or one is of another type.
    """
    try:
        return TypeAdapter(form).validate_json(path.read_bytes(), strict=True)
    except FileNotFoundError:
        fault = "it is not there"
    except ValidationError as error:
        fault = _first_fault(error)
    raise PadstError(f"{complaint} ({fault}); {advice}")


def _first_fault(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"it lacks {key}"
    return str(first["msg"]).replace("Input", key or "it", 1)
