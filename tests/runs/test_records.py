"""metrics.jsonl of both versions, read under one vocabulary."""

import json

import pytest

from kd.errors import UserError
from kd.runs.records import read_metrics

PART = {"forward_kl": 0.5, "num_tokens": 3}
OLD = {
    "step": 1,
    "loss": None,
    "step_ms": 5.5,
    "peak_memory_gib": 1,
    "num_tokens": 7,
    "num_input_tokens": 9,
    "diagnostics": {**PART, "by_section": {"cot": PART}, "by_position": [None, PART]},
}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_records_of_version_1_have_todays_names_at_every_depth(tmp_path):
    (record,) = read_metrics(write(tmp_path / "metrics.jsonl", OLD))
    part = {"forward_kl": 0.5, "num_supervised_tokens": 3}
    assert record == {
        "format_version": 2,
        "step": 1,
        "loss": None,
        "step_ms": 5.5,
        "peak_memory_gib": 1,
        "num_supervised_tokens": 7,
        "num_input_tokens": 9,
        "diagnostics": {**part, "by_section": {"cot": part}, "by_position": [None, part]},
    }


def test_what_was_read_and_written_is_read_alike(tmp_path):
    """A run of version 1 that is continued: MetricsLog writes what it reads."""
    path = write(tmp_path / "metrics.jsonl", OLD)
    first = read_metrics(path)
    assert read_metrics(write(path, *first)) == first


def test_a_torn_last_line_is_left_out(tmp_path):
    path = write(tmp_path / "metrics.jsonl", OLD, OLD)
    path.write_text(path.read_text()[:-20])
    assert len(read_metrics(path)) == 1


def test_records_of_a_later_version_are_refused(tmp_path):
    path = write(tmp_path / "metrics.jsonl", {"format_version": 3, "step": 1})
    with pytest.raises(UserError, match=r"metrics\.jsonl: format_version = 3"):
        read_metrics(path)
