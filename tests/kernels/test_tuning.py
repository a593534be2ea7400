"""What is tuned, what is kept of it, and what a launch takes: no kernel runs here."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import pytest
import torch
from padst_kernels import cache
from padst_kernels.gpu import measured, tuning
from padst_kernels.gpu.measured import Measured
from padst_kernels.steps import GRID, Steps, bucket, octave

from tests.kernels.gpu_fakes import CUDA, Clock, gpu  # noqa: F401

pytestmark = pytest.mark.usefixtures("gpu")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Cut:
    TILE: int
    num_warps: int


SPACE = (Cut(1, 4), Cut(2, 4), Cut(4, 8))


class TritonError(Exception):
    """Stands for triton's own."""


TritonError.__module__ = "triton.errors"


def launcher(clock: Clock, seconds: dict[Cut, float], kernel: str = "k", tokens: int = 5):
    def launch():
        cut = tuning.chosen(kernel, tokens, SPACE, CUDA)
        if seconds[cut] == float("inf"):
            raise TritonError(f"{cut} takes too much shared memory")
        clock.passed += seconds[cut]

    return launch


def times(*seconds: float) -> dict[Cut, float]:
    return dict(zip(SPACE, seconds, strict=True))


def test_the_first_config_until_something_is_known():
    assert tuning.chosen("k", 5, SPACE, CUDA) == tuning.chosen("k", 5, SPACE, CPU) == SPACE[0]


def test_the_fastest_is_kept_for_its_tokens_on_its_device():
    clock = Clock()
    assert tuning.tune(launcher(clock, times(3.0, 1.0, 2.0)), clock, CUDA) == 1.0
    for tokens, expected in ((5, 1), (8, 1), (9, 0), (1, 1)):
        assert tuning.chosen("k", tokens, SPACE, CUDA) == SPACE[expected]
    assert tuning.chosen("other", 5, SPACE, CUDA) == SPACE[0]
    assert tuning.chosen("k", 5, SPACE, CPU) == SPACE[0]
    # What is launched, three Configs, and the end.
    assert clock.calls == len(SPACE) + 2


def test_another_process_finds_it(monkeypatch):
    clock = Clock()
    tuning.tune(launcher(clock, times(3.0, 2.0, 1.0)), clock, CUDA)
    measured.forget()
    assert tuning.chosen("k", 5, SPACE, CUDA) == SPACE[2]
    measured.forget()
    monkeypatch.setattr(measured, "_build", lambda: "other kernels")
    assert tuning.chosen("k", 5, SPACE, CUDA) == SPACE[0]


def test_two_kernels_of_one_piece_of_work_are_tuned_one_after_the_other():
    clock = Clock()
    first, second = launcher(clock, times(1.0, 3.0, 3.0), "a"), launcher(clock, times(3.0, 3.0, 1.0), "b")
    assert tuning.tune(lambda: (first(), second()), clock, CUDA) == 2.0
    assert [tuning.chosen(kernel, 5, SPACE, CUDA) for kernel in "ab"] == [SPACE[0], SPACE[2]]


def test_a_config_that_the_device_refuses_is_passed_over():
    clock, inf = Clock(), float("inf")
    tuning.tune(launcher(clock, times(5.0, inf, 2.0)), clock, CUDA)
    assert tuning.chosen("k", 5, SPACE, CUDA) == SPACE[2]
    with pytest.raises(TritonError):
        tuning.tune(launcher(clock, times(inf, inf, inf), "none"), clock, CUDA)
    broken = times(1.0, 1.0, 1.0)
    del broken[SPACE[1]]
    with pytest.raises(KeyError):  # an error that is no refusal
        tuning.tune(launcher(clock, broken), clock, CUDA)
    assert tuning.chosen("k", 5, SPACE, CPU) == SPACE[0], "a trial that fails ends"


def test_the_default_may_be_refused():
    clock = Clock()
    tuning.tune(launcher(clock, times(float("inf"), 2.0, 1.0)), clock, CUDA)
    assert tuning.chosen("k", 5, SPACE, CUDA) == SPACE[2]


def test_nothing_is_tuned_while_a_graph_is_captured(monkeypatch):
    clock = Clock()
    tuning.tune(launcher(clock, times(3.0, 2.0, 1.0)), clock, CUDA)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="captured"):
        tuning.tune(launcher(clock, times(1.0, 2.0, 3.0)), clock, CUDA)
    assert tuning.chosen("k", 5, SPACE, CUDA) == SPACE[2], "what is known is taken"


def test_a_launch_that_is_traced_takes_what_is_known_and_guards_on_its_limits_alone():
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    figures = {GRID[0]: asdict(SPACE[1]), 16: asdict(SPACE[2]), 32: asdict(SPACE[2]), GRID[-1]: asdict(SPACE[1])}
    measured.keep(CUDA, Measured({"k": figures}))
    env = ShapeEnv()
    tokens = torch._dynamo.source.ConstantSource("tokens")
    symbol = env.create_symintnode(env.create_symbol(20, tokens), hint=20, source=tokens)
    assert tuning.chosen("k", symbol, SPACE, CUDA) == SPACE[2]
    # That a symbol is over 1 torch knows anyway; 16 is no limit, because 32 has the same Config.
    assert [str(guard.expr.args[1]) for guard in env.guards] == ["32"]


@pytest.mark.parametrize("damage", ["", "{", '{"cuts": {}}'])
def test_a_damaged_file_leaves_the_defaults_and_is_written_anew(damage, caplog):
    clock = Clock()
    path = cache.file_of(measured.KIND, measured.device_key(CUDA))
    for _ in range(2):
        tuning.tune(launcher(clock, times(3.0, 2.0, 1.0)), clock, CUDA)
        measured.forget()
        assert tuning.chosen("k", 5, SPACE, CUDA) == SPACE[2]
        path.write_text(damage)
        measured.forget()
        assert tuning.chosen("k", 5, SPACE, CUDA) == SPACE[0]
    assert "cannot be used" in caplog.text


@pytest.mark.parametrize(
    "raw",
    [
        {"cuts": {"k": {"8": {"TILE": "2"}}}, "paths": {}},
        {"cuts": {"k": {"8": {}}}, "paths": {}},
        {"cuts": {"k": {"eight": {"TILE": 2}}}, "paths": {}},
        {"cuts": {}, "paths": {"p": {"8": {"torch-dense": -1}}}},
        {"cuts": {}, "paths": {"p": {"8": {"torch-dense": float("nan")}}}},
        {"cuts": [], "paths": {}},
    ],
)
def test_figures_that_are_none_are_refused(raw):
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        Measured.from_json(raw)


def test_a_config_of_another_space_counts_as_none():
    measured.keep(CUDA, Measured({"k": {8: {"TILE": 1024, "num_warps": 4}}}))
    assert tuning.chosen("k", 5, SPACE, CUDA) == SPACE[0]


def test_what_another_process_kept_meanwhile_stays():
    measured.keep(CUDA, Measured({"a": {8: asdict(SPACE[1])}}))
    key = measured.device_key(CUDA)
    theirs = Measured({"b": {8: asdict(SPACE[2])}, "a": {8: asdict(SPACE[2])}})
    cache.write(measured.KIND, key, measured.of(CUDA).updated(theirs).to_json())
    measured.keep(CUDA, Measured({"a": {16: asdict(SPACE[1])}}))
    assert cache.read(measured.KIND, key, Measured.from_json).cuts == {
        "a": {8: asdict(SPACE[1]), 16: asdict(SPACE[1])},
        "b": {8: asdict(SPACE[2])},
    }


def test_without_a_device_nothing_is_known(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert measured.of(CUDA) == Measured()
    assert tuning.chosen("k", 5, SPACE, CUDA) == SPACE[0]


def test_the_grid():
    assert [bucket(tokens) for tokens in (1, 2, 3, 4, 5, 4096, 4097, 10**6)] == [1, 2, 4, 4, 8, 4096, 8192, GRID[-1]]
    steps = Steps.of({1: "a", 2: "a", 8: "b", GRID[-1]: "b"})
    assert (steps.limits, steps.values) == ((2, GRID[-1]), ("a", "b"))
    assert [steps.at(tokens) for tokens in (1, 2, 3, 10**6)] == ["a", "a", "b", "b"]
    assert Steps.of({4: "a"}).at(5) is None
    assert Steps.of({}).at(5) is None


def test_what_the_speed_of_a_launch_depends_on():
    x, values = torch.zeros(5, 64), torch.zeros(1000, dtype=torch.bfloat16)
    assert tuning.features("k", x, values, 96) == f"k 96x64 {octave(1000)} float32/bfloat16"
    assert tuning.features("k", x[:1], values[:990], 96) == tuning.features("k", x, values, 96)
    assert octave(1000) == octave(1020) != octave(1200)
    assert [octave(2**power) for power in range(5)] == [0, 8, 16, 24, 32]
    assert octave(0) == -1


def test_a_launch_asks_with_its_tensors():
    class OnGpu(torch.Tensor):
        device = CUDA

    x, values = torch.zeros(5, 64).as_subclass(OnGpu), torch.zeros(1000)
    figures = {tuning.features("k", x, values, 96): {8: asdict(SPACE[2])}}
    measured.keep(CUDA, Measured(figures))
    assert tuning.tuned("k", SPACE, 5, x, values, 96) == SPACE[2]
    assert tuning.tuned("k", SPACE, 5, x, values, 128) == SPACE[0]
