from __future__ import annotations

import dataclasses
import inspect
import json
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leannorm import records
from leannorm.records import (
    Change,
    Deployment,
    Environment,
    Epoch,
    Refusal,
    ShippedFile,
    TrainingRun,
    TransformReport,
    Verification,
    from_json,
    read,
    to_json,
    write,
    write_text,
)

RECORDS = [value for value in vars(records).values() if inspect.isclass(value) and dataclasses.is_dataclass(value)]
CHECK = Verification(3, 0.5, 1.0, 1.0, None, None, 0.75, True)
FILE = ShippedFile("model.onnx", "fp32", 10, 1.5, ("bn",), CHECK)


def edited(record, **changes):
    return json.dumps(json.loads(to_json(record)) | changes)


def test_every_record_is_covered():
    assert {Change, Deployment, Environment, Epoch, Refusal, ShippedFile, TrainingRun} < set(RECORDS)


@pytest.mark.parametrize("cls", RECORDS)
@given(data=st.data())
def test_json_and_back_gives_the_same_record(cls, data):
    record = data.draw(st.from_type(cls))
    again = from_json(cls, to_json(record))
    assert repr(again) == repr(record)  # NaN is equal to nothing, but it has a spelling


@given(st.from_type(Deployment))
def test_records_are_hashable_values(record):
    assert hash(record) == hash(dataclasses.replace(record))


def test_numbers_that_are_not_finite_survive():
    again = from_json(Verification, to_json(dataclasses.replace(CHECK, relative_error=float("nan"))))
    assert again.relative_error != again.relative_error
    for value in (float("inf"), -float("inf"), 5e-324, 0.1 + 0.2):
        record = dataclasses.replace(CHECK, relative_error=value)
        assert from_json(Verification, to_json(record)) == record


def test_a_whole_number_is_a_float_where_one_is_expected():
    decoded = from_json(Verification, edited(CHECK, relative_error=1))
    assert type(decoded.relative_error) is float


@pytest.mark.parametrize(
    ("cls", "text", "message"),
    [
        (Change, '{"module": "a"}', r"Change: expected the fields \['action', 'module'\], got \['module'\]"),
        (Change, '{"module": "a", "action": "b", "more": 1}', r"expected the fields .* got .*'more'"),
        (Change, '["a", "b"]', "Change: expected the fields .* got list"),
        (Change, '{"module": "a", "action": 1}', "Change.action: expected str, got 1"),
        (Change, '{"module": "a", "action": null}', "Change.action: expected str, got None"),
        (ShippedFile, edited(FILE, bytes=1.0), "ShippedFile.bytes: expected int, got 1.0"),
        (ShippedFile, edited(FILE, bytes=True), "ShippedFile.bytes: expected int, got True"),
        (ShippedFile, edited(FILE, latency_ms="1"), "ShippedFile.latency_ms: expected float, got '1'"),
        (ShippedFile, edited(FILE, latency_ms=True), "ShippedFile.latency_ms: expected float, got True"),
        (ShippedFile, edited(FILE, latency_ms=10**400), "ShippedFile.latency_ms: expected float, got 1000"),
        (
            ShippedFile,
            edited(FILE, normalization_nodes="bn"),
            "normalization_nodes: expected a list, got 'bn'",
        ),
        (
            ShippedFile,
            edited(FILE, normalization_nodes=["a", 2]),
            r"normalization_nodes\[1\]: expected str, got 2",
        ),
        (ShippedFile, edited(FILE, verification=None), "ShippedFile.verification: expected the fields"),
        (Verification, edited(CHECK, passed=1), "Verification.passed: expected bool, got 1"),
        (
            Verification,
            edited(CHECK, reference_accuracy="no"),
            "reference_accuracy: expected float, got 'no'",
        ),
        (
            Environment,
            edited(Environment("m", 1, "3", (), "c"), versions=[["torch"]]),
            r"Environment.versions\[0\]: expected 2 items, got 1",
        ),
        (
            TransformReport,
            edited(TransformReport(), refusals=[{"module": "a"}]),
            r"TransformReport.refusals\[0\]: expected the fields",
        ),
        (Change, '{"module": ', "Expecting value"),
    ],
)
def test_text_that_is_not_the_record_is_an_error_that_says_where(cls, text, message):
    with pytest.raises(ValueError, match=message):
        from_json(cls, text)


def test_write_and_read(tmp_path):
    write(tmp_path / "report.json", FILE)
    assert read(ShippedFile, str(tmp_path / "report.json")) == FILE
    assert stat.S_IMODE((tmp_path / "report.json").stat().st_mode) == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "page.html"
    write_text(path, "long " * 1000)
    write_text(path, "Größe\n")
    assert path.read_bytes() == "Größe\n".encode()


def test_a_text_that_cannot_be_encoded_leaves_the_old_file(tmp_path):
    path = tmp_path / "page.html"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "x" * 100_000 + "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_at_the_last_step_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write(path, FILE)

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write(path, dataclasses.replace(FILE, bytes=11))
    assert read(ShippedFile, path) == FILE
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "none" / "report.json", "text")
