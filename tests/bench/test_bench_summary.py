"""Figures by hand, and tables from raw results alone."""

import dataclasses
import datetime
import math
from pathlib import Path

import pytest
from rich.console import Console

from leannorm import records
from leannorm.bench import results, summary
from leannorm.bench.results import (
    Check,
    Conditions,
    LayerBenchmark,
    LayerCase,
    SavedBytes,
    Timing,
    TrainingBenchmark,
    TrainingCase,
)
from leannorm.bench.table import tables
from leannorm.records import Environment

ENVIRONMENT = Environment("AMD EPYC, Linux x86_64", 2, "3.13", (("torch", "2.13"),), "0123456789abcdef")
CONDITIONS = Conditions(ENVIRONMENT, "cpu", 2, (("THP_MEM_ALLOC_ENABLE", "1"),), 2**20, 3, 0, quick=False)


def layer_case(operation="bn", shape=(16, 64, 56, 56), dtype="fp32", ours=(1.0, 1.0, 2.0)):
    timings = (
        Timing("torch", 1, (2.0, 4.0, 2.0)),
        Timing("full", 1, ours),
        Timing("copy", 1, (0.2, 0.2, 0.2)),
    )
    check = (Check("full", "y", 1e-7, 1e-7, 2e-7),)
    return LayerCase(operation, shape, "channels_last", dtype, check, timings)


def layer_benchmark(*cases):
    return LayerBenchmark("layers", CONDITIONS, 224, 16, cases)


TRAINING = TrainingBenchmark(
    "training", CONDITIONS, 224, 8, "channels_last", "fp32",
    tuple(
        TrainingCase(
            model,
            (),
            (SavedBytes("torch", 400), SavedBytes("full + fuse", 300)),
            (Timing("torch", 1, (3.0, 3.0)), Timing("full + fuse", 1, (ours, ours)), Timing("ceiling", 1, (1.5, 1.5))),
        )
        for model, ours in (("resnet50", 2.0), ("densenet121", 1.5))
    ),
)  # fmt: skip


def rendered(benchmark) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(tables(benchmark))
    return capture.get()


@pytest.mark.parametrize(
    ("operation", "dtype", "by_hand"),
    [
        # 16 * 64 * 56 * 56 elements, and a pass for each read and write of a map
        ("bn", "fp32", 5 * 4 * 3_211_264),
        ("bn+relu", "bf16", 5 * 2 * 3_211_264),
        ("bn+add+relu", "fp32", 7 * 4 * 3_211_264),
        ("bn+add+relu", "bf16", 7 * 2 * 3_211_264),
    ],
)
def test_bytes_of_the_floor(operation, dtype, by_hand):
    assert summary.floor_bytes(layer_case(operation, dtype=dtype)) == by_hand


def test_the_floor_is_its_passes_at_the_bandwidth_of_the_copy():
    # a copy of 0.2 s is two passes, so five take 0.5 s
    assert summary.floor_share(layer_case("bn"), "full") == pytest.approx([0.5, 0.5, 0.25])
    assert summary.floor_share(layer_case("bn+add+relu"), "full") == pytest.approx([0.7, 0.7, 0.35])
    assert summary.speedup(layer_case("bn"), "floor") == pytest.approx([4.0, 8.0, 4.0])


def test_only_tensors_well_over_the_cache_count_for_the_floor():
    small, large = layer_case(shape=(1, 64, 16, 16)), layer_case(shape=(1, 64, 64, 64))  # 64 KiB and 1 MiB
    assert not summary.is_beyond_cache(small, 2**20)
    assert summary.is_beyond_cache(large, 2**20)
    assert not summary.is_beyond_cache(large, None)
    copied_within = layer_case("bn+add+relu", shape=(1, 64, 64, 32))  # what a copy of it touches fits in
    assert not summary.is_beyond_cache(copied_within, 2**20)
    (row, *_) = summary.layer_rows(layer_benchmark(small))
    assert row.of_floor is None


def test_ratios_are_of_the_same_round():
    assert summary.speedup(layer_case(), "full") == [2.0, 4.0, 1.0]
    assert summary.quartiles([2.0, 4.0, 1.0]) == summary.Quartiles(1.5, 2.0, 3.0)


def test_layer_rows():
    fast, slow = layer_case(ours=(0.5, 1.0, 0.5)), layer_case(shape=(16, 64, 28, 28), ours=(4.0, 8.0, 4.0))
    rows = {row.side: row for row in summary.layer_rows(layer_benchmark(fast, slow))}
    assert list(rows) == ["full", "torch", "floor"]
    assert rows["full"].speedup.median == pytest.approx(math.sqrt(4 * 0.5))
    assert (rows["full"].worst, rows["full"].worst_shape) == (0.5, (16, 64, 28, 28))
    assert rows["torch"].speedup == summary.Quartiles(1.0, 1.0, 1.0)


def test_layer_rows_over_several_layouts_and_dtypes():
    rows = summary.layer_rows(layer_benchmark(layer_case(), layer_case(dtype="bf16", ours=(2.0, 4.0, 2.0))))
    ours = {row.dtype: row.speedup.median for row in rows if row.side == "full"}
    assert ours == pytest.approx({"all": math.sqrt(2), "fp32": 2.0, "bf16": 1.0})


def test_training_rows():
    rows = {(row.model, row.side): row for row in summary.training_rows(TRAINING)}
    assert rows["resnet50", "full + fuse"].speedup.median == 1.5
    assert rows["geometric mean", "full + fuse"].speedup.median == pytest.approx(math.sqrt(1.5 * 2))
    assert rows["resnet50", "full + fuse"].saved == 0.75
    assert rows["resnet50", "ceiling"].saved is None


@pytest.mark.parametrize("benchmark", [layer_benchmark(layer_case()), TRAINING], ids=["layers", "training"])
def test_a_file_alone_gives_the_table(tmp_path, benchmark):
    records.write(tmp_path / "results.json", benchmark)
    again = results.read(tmp_path / "results.json")
    assert again == benchmark
    assert rendered(again) == rendered(benchmark)


def test_tables_show_the_figures_and_the_conditions():
    shown = rendered(layer_benchmark(layer_case()))
    assert "2.00x" in shown
    assert "1.50-3.00" in shown
    assert "64x56x56" in shown
    for condition in ("AMD EPYC", "2 threads", "THP_MEM_ALLOC_ENABLE=1", "0123456789", "3 interleaved rounds"):
        assert condition in " ".join(shown.split())
    assert "QUICK" not in shown
    quick = dataclasses.replace(layer_benchmark(layer_case()), conditions=dataclasses.replace(CONDITIONS, quick=True))
    assert "QUICK" in rendered(quick)
    assert "75%" in rendered(TRAINING)


@pytest.mark.parametrize(
    ("text", "message"), [("{}", "kind is None"), ("[1]", "kind is None"), ('{"kind": "x"}', "'x'"), ("no", "not JSON")]
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        results.read(tmp_path / "a.json")


def test_default_path():
    day = datetime.date(2026, 3, 9)
    name = "amd-epyc-linux-x86-64-2026-03.json"
    assert results.default_path("layers", CONDITIONS, day) == Path(f"benchmarks/results/layers-{name}")
    quick = dataclasses.replace(CONDITIONS, quick=True, device="NVIDIA H100")
    assert results.default_path("training", quick, day).name == f"training-quick-nvidia-h100-{name}"
