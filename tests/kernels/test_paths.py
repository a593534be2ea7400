"""What runs a layer on a GPU: measured figures first, rules where there are none."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch
from padst_kernels import dispatch
from padst_kernels.dispatch import calibrate_gpu, kernel_name, prepare, select
from padst_kernels.gpu import calibrate, measured, paths, rules, semi
from padst_kernels.gpu.measured import Measured
from padst_kernels.gpu.paths import fastest, signature, signature_of
from padst_kernels.steps import GRID

from tests.kernels.gpu_fakes import CUDA, Clock, gpu  # noqa: F401

BF16 = torch.bfloat16
TRITON = {structure: f"cuda-triton-{structure}" for structure in rules.STRUCTURES}


pytestmark = pytest.mark.usefixtures("gpu")


@pytest.fixture(autouse=True)
def _with_triton(monkeypatch):
    monkeypatch.setattr(rules, "HAS_TRITON", True)


def known(layout, figures, dtype=BF16):
    measured.keep(CUDA, Measured(paths={signature(layout, dtype): figures}))


def name(layout, tokens, dtype=BF16):
    return kernel_name(layout, CUDA, tokens, dtype)


@pytest.fixture
def diag(make_case):
    return make_case("diag", 64, 48, 0.1, "i", BF16).layout


def test_rules_until_something_is_measured(diag):
    assert [name(diag, tokens) for tokens in (1, 2, 65)] == [TRITON["diag"], "torch-dense", "torch-dense"]


def test_the_fastest_path_by_tokens(diag):
    slow, quick = {"torch-dense": 1.0, TRITON["diag"]: 2.0}, {"torch-dense": 2.0, TRITON["diag"]: 1.0}
    known(diag, {1: quick, 8: slow, 256: quick, GRID[-1]: slow})
    expected = {1: TRITON["diag"], 2: "torch-dense", 9: TRITON["diag"], 256: TRITON["diag"], 257: "torch-dense"}
    expected[10**6] = "torch-dense"
    assert {tokens: name(diag, tokens) for tokens in expected} == expected


def test_beyond_what_was_measured_rules_hold(diag):
    known(diag, {4: {"torch-dense": 2.0, TRITON["diag"]: 1.0}})
    assert [name(diag, tokens) for tokens in (4, 5, 65)] == [TRITON["diag"], "torch-dense", "torch-dense"]
    assert name(diag, 4, torch.float32) == "torch-dense", "figures are those of a dtype"


def test_a_dense_weight_must_be_clearly_faster():
    assert fastest({"torch-dense": 0.98, "a": 1.0, "b": 1.1}) == "a"
    assert fastest({"torch-dense": 0.97, "a": 1.0}) == "torch-dense"
    assert fastest({"torch-dense": 1.0}) == "torch-dense"
    assert fastest({"a": 1.0}) == "a"


def test_layers_that_are_alike_share_their_figures(make_case):
    def of(*arguments, **options):
        return signature(make_case(*arguments, **options).layout, BF16)

    first = of("block", 64, 64, 0.3, "i", block_size=16)
    assert first == of("block", 64, 64, 0.3, "i", block_size=16)
    others = {
        of("block", 64, 64, 0.3, "i", block_size=32),
        of("block", 64, 96, 0.3, "i", block_size=16),
        of("block", 64, 64, 0.6, "i", block_size=16),
        of("block", 64, 64, 0.3, "io", block_size=16),
        of("block", 64, 64, 0.3, "i", BF16, block_size=16),
        of("diag", 64, 64, 0.3, "i"),
        of("diag", 64, 64, 0.3, "i", band=16),
        of("nm", 64, 64, 0.3, "i", nm=(1, 4)),
    }
    assert len(others | {first}) == 9


class Fake:
    """A kernel whose calls take `of(tokens)` seconds of a clock; `made` counts them."""

    made = 0

    def __init__(self, clock, of, path="", error=None):
        self.clock, self.of, self.name, self.error = clock, of, path, error

    def __call__(self, x, bias):
        self.clock.passed += self.of(len(x))
        return x.new_zeros(len(x), len(bias))

    def prepare(self, _):
        type(self).made += 1
        if self.error:
            raise self.error

    def resident_bytes(self):
        return 0


def test_calibrating_measures_each_kind_once_and_drops_what_is_hopeless(make_case):
    clock, seen = Clock(), []
    layouts = [make_case("diag", 64, 48, 0.2, "i", BF16).layout for _ in range(3)]
    found = {
        "torch-dense": lambda _: Fake(clock, lambda _: 1.0),
        TRITON["diag"]: lambda _: Fake(clock, lambda tokens: 0.1 * tokens),
    }
    left = calibrate.calibrate(
        layouts,
        BF16,
        lambda _: found,
        tokens=(1, 16, 100, 256),
        timer=clock,
        on_measured=lambda *what: seen.append(what),
    )
    assert left == 0
    assert [(done, total) for done, total, _ in seen] == [(number, 4) for number in range(4)]
    measured.forget()
    (by_tokens,) = measured.of(CUDA).paths.values()
    assert {tokens: set(times) for tokens, times in by_tokens.items()} == {
        1: {"torch-dense", TRITON["diag"]},
        16: {"torch-dense", TRITON["diag"]},
        128: {"torch-dense", TRITON["diag"]},  # 12.8 times dense: the last one
        256: {"torch-dense"},
    }
    assert by_tokens[16][TRITON["diag"]] == pytest.approx(1.6)
    assert [name(layouts[0], tokens) for tokens in (1, 16, 256)] == [TRITON["diag"], "torch-dense", "torch-dense"]


def test_a_path_that_torch_lacks_is_said_and_left_out(make_case, caplog):
    clock = Clock()
    layout = make_case("nm", 64, 64, 0.5, "i", BF16, nm=(2, 4)).layout
    found = {
        "torch-dense": lambda _: Fake(clock, lambda _: 1.0),
        semi.NAME: lambda _: Fake(clock, lambda _: 0.5, error=semi.Unavailable("cusparselt: not compiled")),
    }
    calibrate.calibrate([layout], BF16, lambda _: found, tokens=(4096,), timer=clock)
    assert "cuda-semi-structured serves no nm 64x64" in caplog.text
    assert "not compiled" in caplog.text
    measured.forget()
    assert name(layout, 4096) == "torch-dense"


def test_a_deadline_leaves_the_rest_to_the_rules(make_case, monkeypatch):
    clock, now = Clock(), iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    layouts = [make_case("block", 64, size, 0.2, "i", BF16).layout for size in (48, 80)]
    found = {"torch-dense": lambda _: Fake(clock, lambda _: 1.0)}
    assert calibrate.calibrate(layouts, BF16, lambda _: found, tokens=(1, 2), timer=clock, deadline=2.5) == 1
    measured.forget()
    assert name(layouts[1], 2) == TRITON["block"]
    assert name(layouts[0], 2) == "torch-dense"


def test_what_takes_too_much_memory_is_left_to_the_rules_and_the_rest_is_measured(make_case, caplog):
    clock = Clock()
    layouts = [make_case("block", 64, size, 0.2, "i", BF16).layout for size in (48, 80)]

    def seconds(tokens, size):
        if size == 48 and tokens > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return 1.0

    def paths_of(layout):
        return {"torch-dense": lambda _: Fake(clock, lambda tokens: seconds(tokens, layout.in_features))}

    assert calibrate.calibrate(layouts, BF16, paths_of, tokens=(1, 2, 4, 8), timer=clock) == 2
    assert "block 64x48" in caplog.text
    assert "out of memory (CUDA out of memory.), 2 token counts are left to rules" in caplog.text
    measured.forget()
    assert [name(layouts[0], tokens) for tokens in (2, 4)] == ["torch-dense", TRITON["block"]]
    assert [name(layouts[1], tokens) for tokens in (2, 8)] == ["torch-dense", "torch-dense"]


def test_layers_take_what_was_measured_from_then_on(make_case, monkeypatch):
    clock = Clock()
    found = {"torch-dense": lambda _: Fake(clock, lambda _: 1.0)}
    monkeypatch.setitem(calibrate.calibrate.__kwdefaults__, "timer", clock)
    monkeypatch.setattr(dispatch, "_gpu_paths", lambda *_: found)
    layout = make_case("diag", 64, 48, 0.2, "i", BF16).layout
    layout.choices[BF16] = paths.steps(layout, CUDA, BF16, lambda _: TRITON["diag"])
    assert name(layout, 1) == TRITON["diag"]
    assert calibrate_gpu([layout], BF16, tokens=(1,)) == 0
    measured.forget()
    assert name(layout, 1) == "torch-dense"


def test_steps_of_training_are_chosen_with_their_launches():
    """Tuned by one timer, timed by another one; each kind is made when its turn has come."""
    alone, together, made = Clock(), Clock(), []

    def steps_of(name):
        def make():
            made.append(name)

            def step(launch, work):
                alone.passed += work
                together.passed += max(launch, work)

            return lambda tokens: {
                "torch-dense": partial(step, 1.0, tokens / 100),
                TRITON["block"]: partial(step, 2.0, tokens / 1000),
            }

        return make

    kinds = {name: steps_of(name) for name in ("training a", "training b")}
    grads = []
    left = calibrate.calibrate_training(
        kinds, CUDA, tokens=(64, 100, 512), tuner=alone, timer=together, on_measured=lambda *_: grads.append(len(made))
    )
    assert (left, made) == (0, ["training a", "training b"])
    assert grads == [1, 1, 1, 2, 2, 2]
    assert alone.calls == together.calls * 2  # what is launched, and the end; there are no Configs
    measured.forget()
    for name in kinds:
        assert measured.of(CUDA).paths[name][64] == {"torch-dense": 1.0, TRITON["block"]: 2.0}
        known = paths.fastest_by_tokens(name, CUDA)
        assert [known.at(tokens) for tokens in (64, 128, 129, 512, 513)] == [
            *["torch-dense"] * 2, *[TRITON["block"]] * 2, None
        ]  # fmt: skip
    assert paths.fastest_by_tokens("training c", CUDA).at(64) is None


def test_steps_of_training_record_gradients_whatever_is_set_around_them():
    seen = []
    with torch.no_grad():
        calibrate.calibrate_training(
            {"training": lambda: lambda _: {"torch-dense": lambda: seen.append(torch.is_grad_enabled())}},
            CUDA, tokens=(64,), tuner=Clock(), timer=Clock(),
        )  # fmt: skip
    assert seen
    assert all(seen)


def test_figures_of_training_are_apart(make_case):
    layout = make_case("block", 64, 48, 0.3, "i", torch.float32, block_size=16).layout
    entries = layout.tensors["values"].numel()

    def of(*sides, kinds=(torch.float32, BF16), count=entries):
        return signature_of("block", (64, 48), layout.parameters, count, kinds, sides, training=True)

    names = {of("perm_in"), of(), of("perm_in", count=2 * entries), of("perm_in", kinds=(BF16, BF16))}
    assert len({*names, signature(layout, BF16)}) == 5
    assert of("perm_in") == f"training {signature(layout, BF16)}"


@pytest.mark.parametrize("structure", ["diag", "block", "nm"])
def test_the_paths_that_are_compared(make_case, monkeypatch, structure):
    layout = make_case(structure, 64, 64, 0.2, "i", BF16).layout
    assert set(dispatch._gpu_paths(layout, BF16)) == {"torch-dense", TRITON[structure]}
    two_of_four = make_case("nm", 64, 64, 0.5, "i", BF16, nm=(2, 4)).layout
    assert set(dispatch._gpu_paths(two_of_four, BF16)) == {"torch-dense", TRITON["nm"], semi.NAME}
    monkeypatch.setattr(rules, "HAS_TRITON", False)
    assert set(dispatch._gpu_paths(layout, BF16)) == {"torch-dense"}


class _OnGpu:
    """The values of a layer that seems to be on a GPU."""

    def __init__(self, values):
        self._values, self.device, self.dtype = values, CUDA, values.dtype

    def numel(self):
        return self._values.numel()


def test_a_layer_on_a_gpu_without_figures_says_so_once(make_case, monkeypatch, caplog):
    monkeypatch.setattr(
        dispatch, "_KERNELS", {path: lambda _, path=path: path for path in ("torch-dense", TRITON["diag"])}
    )
    dispatch._say_unmeasured.cache_clear()
    for _ in range(2):
        layout = make_case("diag", 64, 48, 0.1, "i", BF16).layout
        layout.tensors = {**layout.tensors, "values": _OnGpu(layout.tensors["values"])}
        assert [select(layout, tokens, BF16) for tokens in (1, 65)] == [TRITON["diag"], "torch-dense"]
    assert caplog.text.count("--calibrate") == 1


def test_nothing_is_made_while_a_graph_is_captured(make_case, monkeypatch):
    layout = make_case("diag", 64, 48, 0.1, "i", BF16).layout
    layout.tensors = {**layout.tensors, "values": _OnGpu(layout.tensors["values"])}
    monkeypatch.setattr(dispatch, "_KERNELS", {TRITON["diag"]: lambda _: "made"})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call the model once before capturing it"):
        select(layout, 1, BF16)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert select(layout, 1, BF16) == "made"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert select(layout, 1, BF16) == "made"


def test_before_tracing_all_paths_are_made(make_case, monkeypatch):
    layout = make_case("diag", 64, 48, 0.2, "i", BF16).layout
    layout.tensors = {**layout.tensors, "values": _OnGpu(layout.tensors["values"])}
    quick = {tokens: {"torch-dense": 2.0, TRITON["diag"]: 1.0} for tokens in (1, GRID[-1])}
    known(layout, {**quick, 16: {"torch-dense": 1.0}})
    clock = Clock()
    monkeypatch.setattr(
        dispatch,
        "_KERNELS",
        {path: lambda _, path=path: Fake(clock, float, path) for path in ("torch-dense", TRITON["diag"])},
    )
    prepare(layout, BF16)
    assert set(layout.prepared) == {"torch-dense", TRITON["diag"]}
