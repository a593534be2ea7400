"""What a plan says of the checkpoint's size."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from padst_cli.pipeline import plan
from padst_cli.recipe import Recipe
from tests import models


def test_without_a_dtype_in_the_config_the_stored_one_counts(tmp_path: Path) -> None:
    models.build("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    told = plan(str(tmp_path), Recipe()).dense_bytes
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["dtype"]
    file.write_text(json.dumps(config))
    assert plan(str(tmp_path), Recipe()).dense_bytes == told
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    assert plan(str(tmp_path), Recipe()).dense_bytes == 2 * told
