"""Opening a model by hub id or folder: its config, task and class; dense weights; tokenizer or image processor."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import nn

from padst_cli.checkpoint.format import QUANT_METHOD, PadstFormat
from padst_cli.errors import PadstError

Task = Literal["causal-lm", "masked-lm", "image-classification", "encoder"]
Modality = Literal["text", "image"]

# The card is where a model names its licence.
SMALL_FILES = ["*.json", "*.txt", "*.jinja", "*.model", "*.codes", "*.tiktoken", "README.md"]
_WEIGHT_FILES = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "spm.model",
    "bpe.codes",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """A model that was found: where it lies, what it is for, and padst's header where padst wrote it."""

    name: str
    folder: Path
    config: Any
    task: Task
    modality: Modality
    architecture: str
    padst: PadstFormat | None

    @property
    def model_class(self) -> Any:
        """The transformers class that the checkpoint names as its architecture."""
        import transformers

        return getattr(transformers, self.architecture)


def open_source(model: str, *, weights: bool = True, revision: str | None = None) -> Source:
    """Find a model by local folder or hub id and say what it is; `weights=False` fetches the small files only.

    Raises `PadstError` for what is missing, unreachable, not a transformers model, pickle-only, already quantized by
    something else, or of a kind that padst does not handle (encoder-decoder, audio, text and images together, another
    head).
    """
    path = Path(model).expanduser()
    if path.is_dir():
        folder = path
    elif path.exists():
        raise PadstError(f"'{model}' is a file; give the folder that holds config.json, or a hub id")
    else:
        folder = _fetch(model, weights=weights, revision=revision)
    config = _read_config(model, folder)
    if weights:
        try:
            weight_files(folder, model)
        except PadstError as error:
            if folder is path:
                raise
            # Without the hub, a download gives what an earlier one left: `plan` leaves the small files alone.
            raise PadstError(
                f"{error}; where the hub has more, it was not reached and the cache holds a part alone: check the "
                "connection"
            ) from None
    architecture = _architecture(model, config)
    modality = _modality(model, config, architecture)
    return Source(
        name=model,
        folder=folder,
        config=config,
        task=_task(model, architecture),
        modality=modality,
        architecture=architecture,
        padst=_padst_format(model, config),
    )


def skeleton(source: Source) -> nn.Module:
    """The dense model of the source's architecture on the meta device, in evaluation mode; no weights are read."""
    with torch.device("meta"):
        return untrained(source)


def untrained(source: Source) -> nn.Module:
    """The dense model of the source's architecture in evaluation mode, on torch's default device and in its default
    dtype, with the random weights that transformers begins with.

    Raises `PadstError` where transformers cannot make it from the config.
    """
    with _transformers_at_work(f"'{source.name}': no {source.architecture} can be made from its config.json"):
        model: nn.Module = source.model_class(plain_config(source))
    return model.eval()


def load_dense(source: Source, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> nn.Module:
    """The dense model with its weights, in evaluation mode.

    Raises `PadstError` where padst wrote the folder, a tensor is missing or of the wrong shape, a file is damaged, or a
    weight is NaN or infinite (the tensor is named).
    """
    if source.padst is not None:
        raise PadstError(f"'{source.name}' was already made sparse by padst; give the dense model it was made from")
    model, info = from_pretrained(source, dtype=dtype)
    if info["missing_keys"]:
        raise PadstError(
            f"'{source.name}' lacks the weights {_some(info['missing_keys'])}; the checkpoint is not whole"
        )
    check_finite(model, source.name)
    return model.to(device).eval()


def from_pretrained(source: Source, dtype: torch.dtype | None = None) -> tuple[Any, dict[str, Any]]:
    """The source through transformers' own loading on the CPU, with its loading info; `PadstError` for what it
    raises.
    """
    from safetensors import SafetensorError

    with _transformers_at_work(f"'{source.name}' cannot be loaded"):
        try:
            model, info = source.model_class.from_pretrained(
                source.folder,
                dtype="auto" if dtype is None else dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=False,
                # Told below by name and shape, where transformers points to a table that it has logged.
                ignore_mismatched_sizes=source.padst is None,
            )
        except SafetensorError as error:
            raise PadstError(f"'{source.name}' has a damaged safetensors file ({error}); fetch it again") from error
    for name, stored, wanted in sorted(info["mismatched_keys"]):
        raise PadstError(
            f"'{source.name}' stores '{name}' with shape {list(stored)}, and its config.json makes it {list(wanted)}; "
            "weights and config do not belong together"
        )
    return model, info


def check_finite(model: nn.Module, name: str) -> None:
    """Raise `PadstError` that names the first parameter or buffer of `model` with a NaN or infinite entry."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for key, tensor in tensors:
        # Masks kept as buffers may hold -inf on purpose; NaN is wrong anywhere.
        bad = ~torch.isfinite(tensor) if isinstance(tensor, nn.Parameter) else torch.isnan(tensor)
        if bool(bad.any()):
            raise PadstError(
                f"'{name}' has {int(bad.sum())} NaN or infinite values in '{key}'; the checkpoint is damaged"
            )


def load_processor(source: Source) -> Any | None:
    """The tokenizer (text) or image processor (image) saved with the model, None where the folder holds none."""
    from transformers import AutoImageProcessor, AutoTokenizer

    if source.modality == "image":
        loader, present = AutoImageProcessor, (source.folder / "preprocessor_config.json").is_file()
    else:
        loader, present = AutoTokenizer, any((source.folder / file).is_file() for file in TOKENIZER_FILES)
    if not present:
        return None
    kind = "image processor" if source.modality == "image" else "tokenizer"
    with _transformers_at_work(f"the {kind} of '{source.name}' cannot be loaded"):
        return loader.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)


def plain_config(source: Source) -> Any:
    """A copy of the config without padst's header: the config of the dense model."""
    import copy

    config = copy.deepcopy(source.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a checkpoint, sorted; raises `PadstError` where there is none, a shard is absent, or
    only pickle files are there.
    """
    # The order is transformers' own: what is checked must be what is loaded.
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _shards(index, name)
    if any(True for pattern in _PICKLES for _ in folder.glob(pattern)):
        raise PadstError(
            f"'{name}' holds its weights as pickle files only, which can run code when opened; "
            "padst reads safetensors: save the model again with a current transformers"
        )
    raise PadstError(f"'{name}' has no weights: neither model.safetensors nor model.safetensors.index.json is there")


def _shards(index: Path, name: str) -> list[Path]:
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PadstError(f"'{name}': {index.name} is damaged ({_first_line(error)})") from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise PadstError(
                f"'{name}': {index.name} lists {file!r}, which is no file beside it; fetch the model again"
            )
    absent = [file for file in files if not (index.parent / file).is_file()]
    if absent or not files:
        raise PadstError(
            f"'{name}' lacks the shard {_some(absent)} that {index.name} lists; the checkpoint is not whole"
        )
    return [index.parent / file for file in files]


def _fetch(model: str, *, weights: bool, revision: str | None) -> Path:
    if not _HUB_ID.fullmatch(model):
        raise PadstError(f"no folder '{model}', and it is not the form of a hub id (NAME or ORG/NAME)")
    import huggingface_hub
    from huggingface_hub import errors

    patterns = [*SMALL_FILES, *(_WEIGHT_FILES if weights else [])]
    ignore = ["*/*", *([] if weights else ["model.safetensors.index.json"])]
    where = f"'{model}'" + (f" at revision '{revision}'" if revision else "")
    try:
        folder = huggingface_hub.snapshot_download(
            model, revision=revision, allow_patterns=patterns, ignore_patterns=ignore
        )
    except errors.GatedRepoError as error:
        raise PadstError(f"{where} is gated: accept its terms on the hub and log in with `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise PadstError(f"'{model}' has no revision '{revision}' on the hub") from error
    except errors.RepositoryNotFoundError as error:
        raise PadstError(
            f"no folder '{model}' and no such model on the hub (for a private one log in with `hf auth login`)"
        ) from error
    except errors.HFValidationError as error:
        raise PadstError(f"no folder '{model}', and it is no name that the hub allows ({_reason(error)})") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise PadstError(
            f"no folder '{model}', and the hub cannot be reached to fetch {where}; check the spelling or the connection"
        ) from error
    return Path(folder)


def _read_config(model: str, folder: Path) -> Any:
    from transformers import AutoConfig

    file = folder / "config.json"
    if not file.is_file():
        raise PadstError(f"'{model}' is not a transformers model: it has no config.json")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PadstError(f"'{model}': config.json is not valid JSON ({_first_line(error)})") from None
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise PadstError(f"'{model}': config.json names no model_type, so it is not a transformers model")
    with _transformers_at_work(f"'{model}': transformers cannot read its config of type '{raw['model_type']}'"):
        # Not said, transformers asks on stdout and takes the answer from stdin.
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    labels = getattr(config, "label2id", None)
    if labels is not None:
        try:
            # The example script that fine-tunes image classifiers writes the numbers as text.
            config.label2id = {name: int(number) for name, number in labels.items()}
        except (AttributeError, TypeError, ValueError):
            raise PadstError(f"'{model}': label2id in config.json is no mapping of class names to numbers") from None
    return config


def _architecture(model: str, config: Any) -> str:
    import transformers

    names = getattr(config, "architectures", None)
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise PadstError(
            f"'{model}': config.json names no architecture in a list; save the model again with save_pretrained"
        )
    if not hasattr(transformers, names[0]):
        raise PadstError(
            f"'{model}' is a {names[0]}, which this version of transformers ({transformers.__version__}) does not have"
        )
    return names[0]


def _task(model: str, architecture: str) -> Task:
    import transformers
    from transformers.models.auto import modeling_auto as auto

    mappings: tuple[tuple[Task, Any], ...] = (
        ("causal-lm", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("masked-lm", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        ("image-classification", auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    )
    for task, mapping in mappings:
        if architecture in _flat(mapping.values()):
            return task
    made = getattr(transformers, architecture)
    if {"input_ids", "pixel_values"} <= inspect.signature(made.forward).parameters.keys():
        raise PadstError(
            f"'{model}' is a {architecture}, which takes text and images together; padst handles models that take one "
            "of them: save its text or its image tower as a model of its own"
        )
    hidden = _gives_hidden_states(made)
    if hidden is None:
        hidden = architecture in _flat(auto.MODEL_MAPPING_NAMES.values())
    if not hidden:
        raise PadstError(
            f"'{model}' is a {architecture}, whose head padst does not handle; give a causal or masked language model, "
            "an image classifier, or an encoder saved without its head"
        )
    return "encoder"


def _gives_hidden_states(made: Any) -> bool | None:
    """Whether what the class's `forward` says it returns holds the last hidden state; None where it says too little.

    This is what an encoder is trained and measured by, and no table of transformers lists all towers that have it.
    """
    try:
        said = get_type_hints(inspect.unwrap(made.forward)).get("return")
    except (NameError, TypeError, AttributeError):
        return None
    fields = [one.__dataclass_fields__ for one in get_args(said) or (said,) if hasattr(one, "__dataclass_fields__")]
    return any("last_hidden_state" in one for one in fields) if fields else None


def _flat(values: Any) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        else:
            yield from value


def _modality(model: str, config: Any, architecture: str) -> Modality:
    import transformers

    if getattr(config, "is_encoder_decoder", False):
        raise PadstError(f"'{model}' is an encoder-decoder model ({architecture}), which padst does not handle")
    main_input = getattr(getattr(transformers, architecture), "main_input_name", None)
    if main_input == "input_ids":
        return "text"
    if main_input == "pixel_values":
        return "image"
    raise PadstError(f"'{model}' ({architecture}) takes '{main_input}' as input; padst handles text and images")


def _padst_format(model: str, config: Any) -> PadstFormat | None:
    header = getattr(config, "quantization_config", None)
    if header is None:
        return None
    raw = header if isinstance(header, dict) else header.to_dict()
    method = raw.get("quant_method")
    if method != QUANT_METHOD:
        raise PadstError(f"'{model}' is already quantized with '{method}'; padst needs the unquantized checkpoint")
    return PadstFormat.from_json(raw, f"'{model}'")


def _some(names: Any) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(f"'{name}'" for name in listed[:3]) + more


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _reason(error: BaseException) -> str:
    """What an error of a library says, on one line; advice in further paragraphs is left out."""
    said = " ".join(str(error).strip().partition("\n\n")[0].split())
    # A KeyError says nothing but the key.
    return said if " " in said else f"{type(error).__name__}: {said}"


@contextmanager
def _transformers_at_work(failure: str) -> Iterator[None]:
    """Quiet transformers reading files that anyone may have written, which can raise anything: `PadstError` that
    says `failure` and why.
    """
    with quiet_transformers():
        try:
            yield
        except PadstError:
            raise
        except Exception as error:
            # What transformers says here advises a flag that would run what anyone may have written.
            own = "it needs code that comes with it, which padst never runs; give a model that transformers itself has"
            raise PadstError(f"{failure} ({own if 'trust_remote_code' in str(error) else _reason(error)})") from error


class quiet_transformers:
    """Keep transformers' warnings and loading bars off the terminal: what matters is checked here and raised."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._verbosity = logging.get_verbosity()
        self._bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self._verbosity)
        if self._bars:
            logging.enable_progress_bar()
