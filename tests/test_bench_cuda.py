"""Benchmarks on a GPU: all but the GPU, which fakes stand for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from padst_kernels.gpu import timing

import padst_cli.bench.calibrate as bench_calibrate
import padst_cli.bench.run as bench_run
from padst_cli.bench import bench, device, random_sparse
from padst_cli.bench.calibrate import calibrate_model, calibrate_steps
from padst_cli.bench.cuda import CudaStopwatch, repeated, stopwatch_for
from padst_cli.bench.decode import _StaticDecoding, decode_rate
from padst_cli.bench.layers import groups_of
from padst_cli.bench.random_model import _Alike
from padst_cli.bench.train import as_trained
from padst_cli.checkpoint.reader import Source, open_source
from padst_cli.errors import PadstError
from padst_cli.recipe import Recipe
from padst_cli.runtime.packing import densify
from padst_cli.runtime.quantizer import packed_layers
from padst_cli.stopwatch import Stopwatch, Timing, Turns, turns_of
from tests import models
from tests.bench_fakes import CPU, QUICK, captured, cuda_stopwatch  # noqa: F401


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("llama")
    models.config("llama", architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return open_source(str(folder), weights=False)


@pytest.fixture(scope="module")
def sparse(source: Source) -> Any:
    recipe = Recipe.from_dict({"structure": "diag", "sparsity": 0.75, "permutation": {"kind": "random"}})
    return random_sparse(source, recipe)


def test_a_graph_holds_all_turns_and_seconds_are_those_of_one(captured: list[int]) -> None:  # noqa: F811
    calls: list[int] = []
    dense = Turns([lambda number=number: calls.append(number) for number in range(3)])
    assert turns_of(dense) == 3
    watch = cuda_stopwatch()
    pair = watch.calls(dense, lambda: calls.append(9))
    assert len(captured) == 2
    assert all(count > 1 for count in captured)
    assert [number for number in calls if number != 9][:6] == [0, 1, 2, 0, 1, 2]
    assert pair.dense > 0
    assert watch.notes == []


def test_seconds_are_divided_by_turns(monkeypatch: pytest.MonkeyPatch, captured: list[int]) -> None:  # noqa: F811
    monkeypatch.setattr(CudaStopwatch, "once", lambda _, work: (work(), 1e-4)[1])
    pair = cuda_stopwatch().calls(Turns([lambda: None] * 4), lambda: None)
    assert (pair.dense, pair.sparse) == (2.5e-5, 1e-4)
    assert len(captured) == 2


def test_what_cannot_be_captured_is_timed_as_it_is_on_both_sides_and_said(
    monkeypatch: pytest.MonkeyPatch,
    captured: list[int],  # noqa: F811
) -> None:
    from padst_cli.bench import cuda

    graph_of = cuda.graph_of

    def refuse_the_second(work: Any) -> Any:
        if captured:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return graph_of(work)

    monkeypatch.setattr(cuda, "graph_of", refuse_the_second)
    watch = cuda_stopwatch()
    watch.calls(lambda: None, lambda: None)
    assert captured == [0]
    (note,) = watch.notes
    assert "without CUDA graphs on both sides: operation not permitted when stream is capturing" in note
    plain = cuda_stopwatch(graphs=False)
    plain.calls(lambda: None, lambda: None)
    assert plain.notes == []


def test_training_steps_are_never_captured(captured: list[int]) -> None:  # noqa: F811
    assert cuda_stopwatch().uncaptured(lambda: None, lambda: None).dense > 0
    assert captured == []


def test_seconds_of_work_as_it_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []

    def event_seconds(work: Any, _: torch.device) -> float:
        before = clock[0]
        work()
        return clock[0] - before

    def work() -> None:
        calls.append(len(calls))
        clock[0] += 1.0 if len(calls) == 1 else 1e-3  # the first one makes what is made once

    monkeypatch.setattr(timing, "event_seconds", event_seconds)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert timing.launched(work) == pytest.approx(1e-3)
    assert len(calls) == 2 + timing.LEAST * round(timing.ENOUGH / 1e-3)


def test_which_stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    watch = stopwatch_for(Timing(), 1, torch.device("cuda"), True)
    assert isinstance(watch, CudaStopwatch)
    assert watch.timing.rotate_bytes > 2 * facts.L2_cache_size
    assert timing.l2_bytes(torch.device("cuda")) == 50 << 20
    assert type(stopwatch_for(Timing(), 1, CPU, True)) is Stopwatch
    assert stopwatch_for(Timing(), 1, CPU, True).timing == Timing()


def test_decoding_from_a_static_cache(sparse: Any, captured: list[int]) -> None:  # noqa: F811
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        rate = decode_rate(sparse, densify(sparse), cuda_stopwatch(), generator, lambda model: model)
    assert (rate.unit, rate.tokens) == ("tokens", 16)
    # Every run replays the one step so often, from the prompt on.
    assert captured == [16 * QUICK.repeats] * 2


def test_a_static_cache_makes_the_tokens_of_a_growing_one(sparse: Any) -> None:
    ids = torch.randint(64, (1, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        side = _StaticDecoding(sparse, ids, 4, sparse)
        first = side.token.clone()
        for _ in range(2):  # the second time after going back
            side.rewind()
            side.token.copy_(first)
            tokens = [int(side.token)]
            for _ in range(4):
                side.step()
                tokens.append(int(side.token))
            expected = ids
            for _ in range(5):
                token = sparse(input_ids=expected).logits[:, -1:].argmax(dim=-1)
                expected = torch.cat([expected, token], dim=1)
            assert tokens == expected[0, 5:].tolist()


def test_everything_is_timed_on_the_gpu_where_the_model_is(sparse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    @contextmanager
    def current(where: torch.device) -> Iterator[None]:
        seen.append(where)
        yield
        seen.append("left")

    monkeypatch.setattr(bench_run, "current", current)
    monkeypatch.setattr(bench_run, "calibrate_model", lambda *_: seen.append("calibrated"))
    monkeypatch.setattr(bench_run._Run, "result", lambda *_: seen.append("measured"))
    bench(sparse, task="causal-lm", calibrate=True, timing=QUICK)
    assert seen == [sparse.device, "calibrated", "measured", "left"]


def test_compiled_models_are_for_a_gpu(sparse: Any) -> None:
    with pytest.raises(PadstError, match="--compile"):
        bench(sparse, task="causal-lm", compiled=True, timing=QUICK)


def test_a_whole_run_with_the_stopwatch_of_a_gpu(
    sparse: Any,
    monkeypatch: pytest.MonkeyPatch,
    captured: list[int],  # noqa: F811
) -> None:
    monkeypatch.setattr(bench_run, "stopwatch_for", lambda *_: cuda_stopwatch())
    result = bench(sparse, task="causal-lm", tokens=(2,), batch=3, train=True, timing=QUICK)
    found = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert found["cuda_graphs"] is True
    assert (found["gpu"], found["compiled"]) == (None, False)
    (note,) = found["notes"]
    assert note.startswith("whole model: 2 sparse layers end in the activation that follows them (silu)")
    assert found["model"]["prefill"]["tokens"] == 6
    assert found["model"]["decode"]["tokens"] == 16
    assert found["train"]["step"]["tokens"] == 6
    assert len(captured) == 2 * (len(found["layers"]) + 2)


def test_calibrating_measures_the_layers_of_a_model_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    layers = {"a": SimpleNamespace(layout=lambda: "layout a")}
    monkeypatch.setattr(bench_calibrate, "packed_layers", lambda _: layers)
    monkeypatch.setattr(bench_calibrate, "calibrate_gpu", lambda *given, **_: seen.append(given))
    monkeypatch.setattr(bench_calibrate, "calibrate_steps", lambda given, **_: seen.append(given))
    monkeypatch.setattr(bench_calibrate, "recalibrate", lambda threads: seen.append(threads))
    model = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    for train in (False, True):
        calibrate_model(model, 1, train, None)
    assert seen == [(["layout a"], torch.bfloat16)] * 2 + [model]
    calibrate_model(SimpleNamespace(device=CPU), 3, True, None)
    assert seen[3:] == [3]


def test_calibrating_takes_steps_of_each_kind_of_layer(sparse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(bench_calibrate, "calibrate_training", lambda *given, **rest: seen.append((given, rest)))
    calibrate_steps(sparse, tokens=(128,), deadline=9.0)
    ((kinds, device), options), *_ = seen
    assert (device, options["tokens"], options["deadline"]) == (sparse.device, (128,), 9.0)
    layer = as_trained(next(iter(packed_layers(sparse).values())))
    assert layer.gpu_signature(sparse.dtype) in kinds
    assert len(kinds) <= len(groups_of(packed_layers(sparse)))
    for make in kinds.values():
        (step,) = make()(3).values()  # on a CPU there is the dense one alone
        step()


def test_one_layer_of_a_kind_is_made_and_copied_for_the_others() -> None:
    made: list[str] = []

    def make(plan: Any) -> Any:
        made.append(plan.name)
        return torch.nn.Linear(2, 2)

    plans = [SimpleNamespace(name=name, structure=kind, sides=("input",), bias=True, transposed=False)
             for name, kind in (("a", 1), ("b", 1), ("c", 2))]  # fmt: skip
    alike = _Alike(make, CPU)
    layers = [alike(plan) for plan in plans]  # type: ignore[arg-type]
    assert made == ["a", "c"]
    assert layers[0].weight.data_ptr() != layers[1].weight.data_ptr()
    assert torch.equal(layers[0].weight, layers[1].weight)


def test_the_facts_of_a_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    facts = SimpleNamespace(name="Pretended", major=9, minor=0, total_memory=80 << 30, L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    monkeypatch.setattr(device, "_DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert device.device_facts(CPU) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    found = device.device_facts(torch.device("cuda"))
    assert (found.capability, found.driver, found.cuda, found.torch) == ("9.0", "unknown", "12.8", torch.__version__)
    assert "Pretended (80 GiB, L2 50 MiB, compute capability 9.0), driver unknown, CUDA 12.8" in found.sentence
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 570.86.15\n")
    tool.chmod(0o755)
    assert device._driver() == "570.86.15"
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
    )
    assert device._driver() == "580.65.06"


def test_repeated() -> None:
    calls: list[int] = []
    repeated(lambda: calls.append(1), 3)()
    assert len(calls) == 3
