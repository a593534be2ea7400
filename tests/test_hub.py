"""Pushing to a hub that is made up here."""

from __future__ import annotations

from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from padst_cli.errors import PadstError
from padst_cli.hub import push
from padst_cli.runtime.packed_linear import PackedLinear
from padst_cli.runtime.packing import install
from padst_cli.structures import StructureOptions, structure_class
from padst_cli.targets import linear_shape
from tests import models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = models.build("gpt2", num_hidden_layers=1)
    layers = {}
    for name, module in model.transformer.h.named_modules():
        if shape := linear_shape(module):
            spec = structure_class("diag").for_density(*shape[:2], 0.2, StructureOptions())
            weight = torch.randn(*shape[:2])
            mask = spec.project(weight.abs())
            layers[f"transformer.h.{name}"] = PackedLinear.from_sparse(
                spec, weight * mask, mask, module.bias.detach(), transposed=True
            )
    target = tmp_path_factory.mktemp("push") / "model"
    install(model, layers, "packed").save_pretrained(target)
    (target / "state").mkdir()
    return target


@pytest.fixture
def hub(monkeypatch):
    """Notes the calls; raises what the test puts into `error`."""
    seen = SimpleNamespace(calls=[], error=None)

    class Api:
        def create_repo(self, repo, **kwargs):
            if seen.error is not None:
                raise seen.error
            seen.calls.append(("create", repo, kwargs))
            return f"https://huggingface.co/{repo}"

        def upload_folder(self, **kwargs):
            seen.calls.append(("upload", kwargs["repo_id"], kwargs))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return seen


def test_a_verified_folder_is_uploaded(hub, folder):
    assert push(folder, "org/name", private=True) == "https://huggingface.co/org/name"
    (create, upload) = hub.calls
    assert create == ("create", "org/name", {"private": True, "exist_ok": True})
    assert upload[2]["folder_path"] == folder
    assert "*.safetensors" in upload[2]["allow_patterns"]
    assert upload[2]["ignore_patterns"] == ["*/*"]


def test_nothing_unsound_is_uploaded(hub, folder, tmp_path):
    with pytest.raises(PadstError, match="no folder"):
        push(tmp_path / "nowhere", "org/name")
    with pytest.raises(PadstError, match=r"no config\.json"):
        push(tmp_path, "org/name")
    with pytest.raises(PadstError, match="ORG/NAME"):
        push(folder, "name")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-4])
    try:
        with pytest.raises(PadstError, match="damaged"):
            push(folder, "org/name")
    finally:
        (folder / "model.safetensors").write_bytes(whole)
    assert not hub.calls


def http_error(status):
    error = errors.HfHubHTTPError.__new__(errors.HfHubHTTPError)
    error.args = ("first line\nsecond line",)
    error.response = SimpleNamespace(status_code=status, headers={})
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.HFValidationError("Cannot have -- in a name"), "no name that the hub allows"),
        (errors.LocalTokenNotFoundError("x"), "hf auth login"),
        (http_error(401), "refuses to write"),
        (http_error(403), "refuses to write"),
        (http_error(500), "refused"),
        (ConnectionError("x"), "cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(hub, folder, error, message):
    hub.error = error
    with pytest.raises(PadstError, match=message) as caught:
        push(folder, "org/name")
    assert "\n" not in str(caught.value)
