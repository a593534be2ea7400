"""Putting a padst folder on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from padst_cli.errors import PadstError

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
UPLOADED = [
    "*.json",
    "*.safetensors",
    "*.txt",
    "*.model",
    "*.codes",
    "*.jinja",
    "*.tiktoken",
    "README.md",
    "recipe.yaml",
    "log.jsonl",
    "report.html",
]
"""What belongs to a model; the resumable state of an unfinished run does not."""


def check_repo(repo: str) -> None:
    """Raise `PadstError` unless `repo` reads like a repository of the hub, ORG/NAME."""
    if not _REPO.fullmatch(repo):
        raise PadstError(f"'{repo}' is not the form of a hub repository, ORG/NAME")


def push(folder: Path, repo: str, *, private: bool = False, message: str | None = None) -> str:
    """Verify a folder that padst wrote and upload it to `repo` (ORG/NAME), made where it does not exist; returns its
    address.

    Raises `PadstError` where the folder is unsound (nothing is uploaded then), the name is malformed, or the hub
    refuses.
    """
    check_repo(repo)
    if not folder.is_dir():
        raise PadstError(f"no folder '{folder}' to push")
    from padst_cli.runtime.describe import verify

    verify(folder)
    import huggingface_hub
    from huggingface_hub import errors

    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=message or "Upload a sparse model made with padst",
            allow_patterns=UPLOADED,
            ignore_patterns=["*/*"],
        )
    except errors.HFValidationError as error:
        raise PadstError(f"'{repo}' is no name that the hub allows ({str(error).splitlines()[0]})") from error
    except errors.LocalTokenNotFoundError as error:
        raise PadstError(
            f"pushing to '{repo}' needs a login: run `hf auth login` with a token that may write"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise PadstError(
                f"the hub refuses to write to '{repo}': log in with a token that may (`hf auth login`)"
            ) from error
        raise PadstError(f"the hub refused '{repo}': {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise PadstError(
            f"the hub cannot be reached to push '{repo}'; nothing is lost, run the command again"
        ) from error
    return str(url)
