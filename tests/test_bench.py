"""What a benchmark reports and how it measures; never how long anything took."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import transformers

import padst_cli.bench.calibrate as bench_calibrate
from padst_cli.bench import BenchResult, LayerRow, Roofline, bench, random_sparse, speedup_chart
from padst_cli.bench.layers import faster_dense
from padst_cli.bench.result import Limits
from padst_cli.bench.roofline import roofline
from padst_cli.bench.train import trainable
from padst_cli.checkpoint.reader import Source, open_source
from padst_cli.errors import PadstError
from padst_cli.recipe import Recipe
from padst_cli.runtime.packing import densify, resident_bytes
from padst_cli.runtime.quantizer import packed_layers
from padst_cli.stopwatch import Stopwatch, Timing, crossing
from padst_cli.training.sparse_linear import DENSE_PRODUCT
from tests import models
from tests.costs import DENSE_WINS

QUICK = Timing(repeats=3, run_seconds=1e-4, rotate_bytes=2**16, max_copies=4)
WIDTH = 64


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """Configs without weights of a causal LM, an image classifier and an encoder."""
    architectures = {"gpt2": "GPT2LMHeadModel", "vit": "ViTForImageClassification", "bert": "BertModel"}
    found = {}
    for name, architecture in architectures.items():
        folder = tmp_path_factory.mktemp(name)
        config = models.config(name, hidden_size=WIDTH, max_position_embeddings=24, architectures=[architecture])
        config.save_pretrained(folder)
        found[name] = open_source(str(folder), weights=False)
    return found


def recipe(structure: str = "diag", permutation: str = "random", **changes: Any) -> Recipe:
    raw = {"structure": structure, "sparsity": 0.75, "permutation": {"kind": permutation}}
    return Recipe.from_dict({**raw, **changes})


def run(source: Source, chosen: Recipe, **options: Any) -> tuple[Any, BenchResult]:
    model = random_sparse(source, chosen)
    return model, bench(model, task=source.task, **{"tokens": (1, 8), "timing": QUICK, **options})


def test_a_causal_model_in_full(sources: dict[str, Source]) -> None:
    before = torch.get_num_threads()
    seen: list[tuple[int, int]] = []
    model, result = run(
        sources["gpt2"], recipe(), threads=1, on_progress=lambda done, total, _: seen.append((done, total))
    )
    assert torch.get_num_threads() == before
    found = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert (found["device"], found["threads"], found["dtype"]) == ("cpu", 1, "float32")
    # Four shapes in a GPT-2 block, at two token counts; the two blocks are alike.
    shapes = [(row["out_features"], row["in_features"], row["tokens"]) for row in found["layers"]]
    assert shapes == [
        (out * WIDTH, inp * WIDTH, tokens) for out, inp in ((3, 1), (1, 1), (4, 1), (1, 4)) for tokens in (1, 8)
    ]
    for row in found["layers"]:
        layer = packed_layers(model)[row["name"]]
        assert row["density"] == layer.format.structure.density == 0.25
        assert row["kernel"] == layer.kernel_name(row["tokens"])
        assert row["count"] == 2
        assert row["structure"] == "diag"
        assert row["speedup"] == pytest.approx(row["dense_us"] / row["sparse_us"])
        assert row["dense_us"] > 0
        assert row["dense_spread"] >= 0
        # The shapes are so small that permutations and padding weigh more than the share the bound allows.
        assert row["resident_bytes"] >= 4 * layer.format.structure.nonzeros
        assert row["resident_bound"] == pytest.approx(1.15 * 4 * layer.format.structure.nonzeros)
        assert row["roofline"]["bound"] in ("bytes", "fma")
        assert row["roofline"]["fraction"] == pytest.approx(row["roofline"]["limit_us"] / row["sparse_us"])
    assert found["limits"]["read_bytes_per_s"] > 0
    assert found["limits"]["fma_per_s"] > 0
    assert found["scratch_bytes"] >= 0
    slow = {row["name"] for row in found["layers"] if row["speedup"] < 0.97}
    assert {one["name"] for one in found["faster_dense"]} == slow
    rates = found["model"]
    assert (rates["prefill"]["unit"], rates["prefill"]["tokens"]) == ("tokens", 8)
    assert (rates["decode"]["unit"], rates["decode"]["tokens"]) == ("tokens", 12)
    for rate in (rates["prefill"], rates["decode"]):
        assert rate["speedup"] == pytest.approx(rate["sparse_per_s"] / rate["dense_per_s"])
    # In this order: making a dense copy brings the model's packed tensors back.
    assert rates["resident_bytes"] == {"sparse": resident_bytes(model), "dense": resident_bytes(densify(model))}
    assert found["break_even_density"] is None
    (note,) = found["notes"]
    assert "2 sparse layers end in the activation that follows them (gelu_tanh)" in note
    assert all(layer.epilogue is None for layer in packed_layers(model).values())
    assert seen == [(done, 11) for done in range(11)]


def test_layers_alone_prepare_nothing_in_the_model(sources: dict[str, Source]) -> None:
    model, result = run(sources["gpt2"], recipe("nm"), layers_only=True)
    assert result.model is None
    assert result.notes == ()
    assert all(layer.prepared_bytes() == 0 for layer in packed_layers(model).values())


def test_images_and_sequences(sources: dict[str, Source]) -> None:
    _, images = run(sources["vit"], recipe("block"), tokens=(4,))
    assert images.model is not None
    assert images.model.prefill.unit == "images"
    assert images.model.decode is None
    _, sequences = run(sources["bert"], recipe("unstructured"), tokens=(512,))
    assert sequences.model is not None
    assert (sequences.model.prefill.unit, sequences.model.prefill.tokens) == ("sequences", 24)
    assert sequences.model.decode is None
    assert {row.tokens for row in sequences.layers} == {512}


def test_break_even_when_asked(sources: dict[str, Source]) -> None:
    _, result = run(sources["bert"], recipe("block"), layers_only=True, break_even=True, tokens=(2,))
    assert result.break_even_density is not None
    assert set(result.to_json()["break_even_density"]) == {"2"}
    value = result.break_even_density[2]
    assert value is None or 0 < value < 1


def row(name: str, tokens: int, dense: float, sparse: float, count: int = 1) -> LayerRow:
    return LayerRow(
        name=name,
        count=count,
        out_features=100,
        in_features=50,
        structure="diag",
        parameters={},
        density=0.5,
        tokens=tokens,
        dense_us=dense,
        sparse_us=sparse,
        speedup=dense / sparse,
        kernel="cpu-portable-diag",
        dense_spread=0.0,
        sparse_spread=0.0,
        resident_bytes=1,
        resident_bound=2.0,
        roofline=Roofline("fma", 0.5, 1.0),
    )


def result_of(*rows: LayerRow) -> BenchResult:
    limits = Limits(1e9, 1e9)
    return BenchResult("cpu", 1, "float32", "float32", rows, None, None, limits, 0, faster_dense(rows, 4))


def test_layers_that_would_be_faster_dense_are_named_with_their_memory() -> None:
    rows = (row("a", 1, 10, 1), row("a", 512, 9, 10, count=3), row("a", 1024, 8, 10), row("b", 512, 9.8, 10))
    (found,) = faster_dense((*rows, row("a", 2048, 5, 10, count=3)), 4)
    assert (found.name, found.tokens) == ("a", (512, 1024, 2048))
    assert found.extra_bytes == 3 * 100 * 50 * 4
    assert "the 3 layers like a would be faster dense at 512, 1024, 2048 tokens" in found.sentence
    assert "0.1 MB more" in found.sentence


def test_the_roofline_is_the_higher_of_two_limits(sources: dict[str, Source]) -> None:
    layer = next(iter(packed_layers(random_sparse(sources["gpt2"], recipe())).values()))
    nonzeros = layer.format.structure.nonzeros
    bound_by_bytes = roofline(layer, 1000, 2, 4, 1e-3, Limits(read_bytes_per_s=1e6, fma_per_s=1e12))
    moved = 1000 + 4 * (2 * (layer.in_features + layer.out_features) + layer.out_features)
    assert bound_by_bytes.bound == "bytes"
    assert bound_by_bytes.limit_us == pytest.approx(moved)
    assert bound_by_bytes.fraction == pytest.approx(moved * 1e-6 / 1e-3)
    bound_by_fma = roofline(layer, 1000, 2, 4, 1e-3, Limits(read_bytes_per_s=1e15, fma_per_s=1e6))
    assert bound_by_fma.bound == "fma"
    assert bound_by_fma.limit_us == pytest.approx(2 * nonzeros)


def test_the_chart_is_a_document_with_a_line_for_each_kind_of_layer() -> None:
    drawn = speedup_chart(
        result_of(row("a", 1, 10, 1), row("a", 32, 8, 4), row("b", 1, 9, 3, 5), row("b", 32, 6, 4, 5))
    )
    root = ElementTree.fromstring(drawn)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    words = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"dense", "all layers", "a (100 x 50)", "b (100 x 50)", "tokens"} <= words
    used = set(re.findall(r"var\((--[a-z]+)\)", drawn))
    assert used <= set(re.findall(r"(--[a-z]+):", drawn))


def test_all_layers_together_count_every_layer() -> None:
    from padst_cli.bench.chart import _together

    # (10 + 5 * 9) / (1 + 5 * 3)
    assert _together(result_of(row("a", 1, 10, 1), row("b", 1, 9, 3, 5))) == [(1, 55 / 16)]


def test_calibrating_is_done_with_the_threads_of_the_run(
    sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(bench_calibrate, "recalibrate", lambda threads: seen.append((threads, torch.get_num_threads())))
    run(sources["gpt2"], recipe(), layers_only=True, tokens=(1,))
    assert not seen
    run(sources["gpt2"], recipe(), layers_only=True, tokens=(1,), calibrate=True, threads=2)
    assert seen == [(2, 2)]


def test_calibrating_kernels_that_are_not_there_is_refused(
    sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_calibrate, "library", lambda: None)
    with pytest.raises(PadstError, match=r"--calibrate .*install a C compiler"):
        run(sources["gpt2"], recipe(), layers_only=True, tokens=(1,), calibrate=True)


def test_the_transient_product_is_named_and_its_weight_counted(
    sources: dict[str, Source], machine_costs: Callable[..., None]
) -> None:
    machine_costs(DENSE_WINS)
    _, result = run(sources["gpt2"], recipe(), layers_only=True, tokens=(1, 64))
    assert {(one.tokens, one.kernel.startswith("cpu-")) for one in result.layers} == {(1, True), (64, False)}
    assert {one.kernel for one in result.layers if one.tokens == 64} == {"torch-dense-transient"}
    assert result.scratch_bytes >= 4 * WIDTH * 4 * WIDTH


def test_crossing_is_interpolated() -> None:
    assert crossing([(0.1, 0.5), (0.3, 0.8), (0.5, 1.6)]) == pytest.approx(0.35)
    assert crossing([(0.1, 1.2), (0.3, 1.4)]) is None
    assert crossing([(0.1, 0.2), (0.7, 0.9)]) == 0.7
    assert crossing([]) is None


def test_random_weights_follow_the_recipe(sources: dict[str, Source]) -> None:
    source = sources["gpt2"]
    permuted = packed_layers(random_sparse(source, recipe("block", block_size=32)))
    for layer in permuted.values():
        perms = [perm for perm in layer.permutations() if perm is not None]
        assert len(perms) == 2
        assert not any(torch.equal(perm, torch.arange(perm.numel(), dtype=torch.int32)) for perm in perms)
        assert layer.format.structure.parameters()["block_size"] == 32
    plain = packed_layers(random_sparse(source, recipe(permutation="none"), value_dtype=torch.bfloat16))
    assert all(layer.permutations() == (None, None) for layer in plain.values())
    assert {layer.values.dtype for layer in plain.values()} == {torch.bfloat16}
    again = random_sparse(source, recipe("block", block_size=32))
    for name, layer in packed_layers(again).items():
        assert torch.equal(layer.dense_weight(), permuted[name].dense_weight())
    with pytest.raises(PadstError, match="random or none"):
        random_sparse(source, recipe(permutation="learned"))


def test_refuses_a_dense_model(sources: dict[str, Source]) -> None:
    model = transformers.GPT2LMHeadModel(sources["gpt2"].config)
    with pytest.raises(PadstError, match="no sparse layers"):
        bench(model, task="causal-lm", timing=QUICK)
    with pytest.raises(PadstError, match="1 or more"):
        run(sources["gpt2"], recipe(), tokens=(0,))


def test_runs_alternate_and_give_medians() -> None:
    calls: list[str] = []
    times = {"dense": iter([4.0, 1.0, 2.0]), "sparse": iter([1.0, 1.0, 1.0])}

    def side(name: str) -> float:
        calls.append(name)
        return next(times[name])

    watch = Stopwatch(Timing(repeats=3), 1, torch.device("cpu"))
    pair = watch.alternate(lambda: side("dense"), lambda: side("sparse"))
    assert calls == ["dense", "sparse"] * 3
    assert (pair.dense, pair.sparse) == (2.0, 1.0)
    assert (pair.dense_spread, pair.sparse_spread) == (0.75, 0.0)


def test_a_long_call_is_timed_by_itself() -> None:
    calls: list[str] = []
    watch = Stopwatch(Timing(repeats=3, run_seconds=0.0), 1, torch.device("cpu"))
    pair = watch.calls(lambda: calls.append("dense"), lambda: calls.append("sparse"))
    # Two calls a side to warm up and to see how long one takes, then the runs in turn.
    assert calls == ["dense"] * 2 + ["sparse"] * 2 + ["dense", "sparse"] * 3
    assert pair.dense > 0


def test_weights_are_rotated(sources: dict[str, Source]) -> None:
    from padst_cli.bench.layers import LayerBench, _sparse_step

    layer = next(iter(packed_layers(random_sparse(sources["gpt2"], recipe())).values()))
    watch = Stopwatch(Timing(rotate_bytes=10 * WIDTH * WIDTH * 3 * 4, max_copies=7), 1, torch.device("cpu"))
    bencher = LayerBench(watch, torch.device("cpu"), torch.float32, 0)
    assert watch.timing.copies(WIDTH * WIDTH * 3 * 4) == 7
    assert watch.timing.copies(5 * WIDTH * WIDTH * 3 * 4) == 2
    assert watch.timing.copies(10**9) == 1
    x = torch.ones(2, WIDTH)
    dense, sparse = bencher._dense_step(layer, x), _sparse_step(bencher._copies(layer, x), x)
    assert dense().shape == sparse().shape == (2, 3 * WIDTH)


@pytest.mark.parametrize("structure", ["diag", "block"])
def test_training_steps_of_layers_and_of_the_model(sources: dict[str, Source], structure: str) -> None:
    _, result = run(sources["gpt2"], recipe(structure), tokens=(64,), threads=1, train=True)
    train = json.loads(json.dumps(result.to_json(), allow_nan=False))["train"]
    assert [(row["out_features"], row["in_features"], row["tokens"]) for row in train["layers"]] == [
        (out * WIDTH, inp * WIDTH, 64) for out, inp in ((3, 1), (1, 1), (4, 1), (1, 4))
    ]
    for row in train["layers"]:
        assert row["speedup"] == pytest.approx(row["dense_us"] / row["sparse_us"])
        assert row["kernel"].startswith("cpu-") or row["kernel"] == DENSE_PRODUCT
    # 64 tokens in sequences of the 24 positions that the model has.
    assert train["step"]["tokens"] == 48
    assert train["step"]["speedup"] == pytest.approx(train["step"]["sparse_per_s"] / train["step"]["dense_per_s"])


def test_training_steps_without_a_loss_are_those_of_layers(sources: dict[str, Source]) -> None:
    _, result = run(sources["vit"], recipe(), tokens=(8,), threads=1, train=True)
    assert result.train is not None
    assert result.train.step is None
    assert len(result.train.layers) > 0


def test_what_is_trained_computes_what_is_packed(sources: dict[str, Source]) -> None:
    model = random_sparse(sources["gpt2"], recipe("nm"))
    for layer in packed_layers(model).values():
        x = torch.randn(600, layer.in_features)
        trained = trainable(layer)
        torch.testing.assert_close(trained(x), layer(x), rtol=1e-4, atol=1e-5)
        assert not trained.dense_gradient


@pytest.mark.parametrize("structure", ["diag", "nm", "block"])
@pytest.mark.parametrize("sparsity", [0.6, 0.77, 0.9])
def test_densities_are_never_under_the_requested(sources: dict[str, Source], structure: str, sparsity: float) -> None:
    model = random_sparse(sources["gpt2"], recipe(structure, sparsity=sparsity))
    for name, layer in packed_layers(model).items():
        assert layer.format.structure.density >= 1.0 - sparsity - 1e-9, name
