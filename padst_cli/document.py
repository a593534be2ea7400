"""Documents that people write: YAML whose unknown keys are refused, and one sentence for what is wrong in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from padst_cli.errors import PadstError, nearest


class Strict(BaseModel):
    """A part of a document: unknown keys are refused, and nothing changes once it is made."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class Document(Strict):
    """What a YAML file holds as a whole."""

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "recipe") -> Self:
        """Validate a mapping; raises `PadstError` with one sentence that names the first offending key."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise PadstError(explain(error, source, cls)) from None

    def to_yaml(self) -> str:
        """The whole of it as YAML that reads back to an equal value."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def dotted(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as a flat one: `{"training": {"steps": 10}}` -> `{"training.steps": 10}`."""
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def read_mapping(name_or_path: str, names: Sequence[str], kind: str) -> dict[str, Any]:
    """The top of a YAML file, or of one that comes with padst under one of `names`; `kind` says what it should be.

    Raises `PadstError` where there is no such file, or no mapping in it.
    """
    path = Path(name_or_path)
    if path.is_file():
        content = path.read_bytes()
    elif name_or_path in names:
        content = resources.files("padst_cli.recipes").joinpath(f"{name_or_path}.yaml").read_bytes()
    else:
        raise PadstError(
            f"no {kind} file '{name_or_path}' and none that comes with padst by that name"
            f"{nearest(name_or_path, list(names))}; the names are {', '.join(names)}"
        )
    try:
        raw = yaml.load(content, Loader=_OnceLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that no calendar has
        raise PadstError(f"{kind} '{name_or_path}' is not valid YAML: {_where(error)}") from None
    if not isinstance(raw, dict):
        raise PadstError(f"{kind} '{name_or_path}' is not a mapping of keys to values")
    return raw


class _OnceLoader(yaml.SafeLoader):
    """As YAML's safe loader, but a key that stands twice in one mapping is an error: the last one would win unseen."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node; raises `yaml.YAMLError` for the second of two equal keys."""
        seen: set[str] = set()
        for key, _ in node.value:
            # A merge (<<) may stand twice, and what it brings may be said anew.
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key '{key.value}' stands twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _where(error: Exception) -> str:
    """What the parser met and on which line, in one line."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(error).splitlines()[0]
    return f"{getattr(error, 'problem', None) or 'it cannot be read'} in line {mark.line + 1}"


def explain(error: ValidationError, source: str, root: type[BaseModel]) -> str:
    """One sentence for the first thing that `root` found wrong; an unknown key is told with the nearest known one."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    if first["type"] in ("extra_forbidden", "invalid_key"):
        model: Any = root
        for part in location[:-1]:
            if not part.isdigit():  # the place in a list
                model = model.model_fields[part].annotation
                model = next(iter(get_args(model)), model)
        known = list(model.model_fields)
        return f"{source}: unknown key '{key}'{nearest(location[-1], known)}; known here are {', '.join(known)}"
    message = first["msg"].removeprefix("Value error, ")
    if not key or message.startswith(location[-1]):
        return f"{source}: {message}"
    if first["type"] == "value_error":
        return f"{source}: {key}: {message}"
    return f"{source}: {key} is {first['input']!r}; {message.replace('Input should', 'it should', 1)}"
