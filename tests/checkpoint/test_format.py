"""The header in config.json: exact round trip, and one sentence for everything that is not right."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from padst_cli.checkpoint.format import FORMAT_VERSION, LayerFormat, PadstFormat, value_dtype_name
from padst_cli.errors import PadstError
from padst_cli.structures import StructureOptions, structure_class, structure_names


def header(form="training", names=None):
    layers = {
        f"h.{number}.proj": LayerFormat(
            structure_class(name).for_density(64, 48, 0.3, StructureOptions()),
            perm_in=number % 2 == 0,
            perm_out=number % 2 == 1,
            bias=number == 0,
            transposed=number == 1,
        )
        for number, name in enumerate(names or structure_names())
    }
    return PadstFormat(layers=layers, form=form, value_dtype="bfloat16")


def test_round_trip_through_json():
    before = header()
    after = PadstFormat.from_json(json.loads(json.dumps(before.to_json())))
    assert after == before
    assert after.torch_value_dtype is torch.bfloat16


def test_tensors_name_every_stored_piece():
    before = header(names=["diag", "nm"])
    found = dict(before.tensors())
    assert found["h.0.proj.perm_in"] == ((48,), torch.int32)
    assert found["h.1.proj.perm_out"] == ((64,), torch.int32)
    assert "h.0.proj.perm_out" not in found
    assert found["h.0.proj.values"][1] is torch.bfloat16


def test_packed_form_refuses_unstructured():
    with pytest.raises(PadstError, match="unstructured, which has no packed form"):
        header("packed", ["diag", "unstructured"])


def broken(path, value):
    raw = copy.deepcopy(header(names=["diag"]).to_json())
    target = raw
    *parents, leaf = path
    for parent in parents:
        target = target[parent]
    if value is KeyError:
        del target[leaf]
    else:
        target[leaf] = value
    return raw


LAYER = ("layers", "h.0.proj")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), FORMAT_VERSION + 1, "newer padst"),
        (("version",), "1", "format version is '1'"),
        (("version",), KeyError, "format version is None"),
        (("form",), "loose", "form is 'loose'"),
        (("value_dtype",), "float8", "value_dtype is 'float8'"),
        (("value_dtype",), [], r"value_dtype is \[\]"),
        (("quant_method",), "gptq", "quant_method"),
        (("layers",), {}, "no sparse layer"),
        (("layers",), [], "expected a mapping"),
        (("colour",), "red", "unknown key colour"),
        ((*LAYER, "structure"), "diagonal", "did you mean 'diag'|unknown structure"),
        ((*LAYER, "structure"), 3, "expected a name"),
        ((*LAYER, "in_features"), 0, "'in_features' is 0"),
        ((*LAYER, "in_features"), True, "'in_features' is True"),
        ((*LAYER, "perm_in"), 1, "'perm_in' is 1"),
        ((*LAYER, "bias"), KeyError, "lacks bias"),
        ((*LAYER, "parameters"), {"count": 3}, "takes the parameters"),
        ((*LAYER, "parameters"), {"count": "3", "band": 1}, "count"),
        ((*LAYER, "parameters"), {"count": 1000, "band": 1}, "count"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(path, value, message):
    with pytest.raises(PadstError, match=message) as caught:
        PadstFormat.from_json(broken(path, value), "'somewhere'")
    assert "'somewhere'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_value_dtype_names():
    assert value_dtype_name(torch.float16) == "float16"
    with pytest.raises(PadstError, match="float64"):
        value_dtype_name(torch.float64)
