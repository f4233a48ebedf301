"""Results on disk and in a table."""

import json
from pathlib import Path

from kd.evaluate.generate import Sampling
from kd.evaluate.report import results, table
from kd.evaluate.score import Summary
from kd.files import write_json, write_jsonl

SUMMARY = Summary(0.5, (0.2366, 0.7634), 10, 5, 81.25, 0.1, 0.0, 0)
CONTENT = results("half", "runs/half/student", "tiny", "report.jsonl", "exact", Sampling(96, 0.6, 0.95, 7), SUMMARY)


def test_results_hold_all_that_repeats_the_evaluation(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "half.json", CONTENT)
    found = json.loads((tmp_path / "new" / "half.json").read_text())
    assert found["accuracy"] == 0.5
    assert found["ci95"] == [0.2366, 0.7634]
    assert found["sampling"] == {"max_new_tokens": 96, "temperature": 0.6, "top_p": 0.95, "seed": 7}
    assert (found["model"], found["recipe"], found["judge"]) == ("runs/half/student", "tiny", "exact")
    assert found["environment"]["packages"]["torch"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["half.json"]


def test_the_table_has_a_line_per_model_and_columns_that_line_up() -> None:
    lines = table([CONTENT, {**CONTENT, "label": "a longer label", "accuracy": 1.0}]).splitlines()
    assert lines[0].split() == ["model", "accuracy", "95", "%", "interval", "problems", "tokens", "unclosed"]
    assert lines[2].split() == ["half", "0.500", "0.237-0.763", "10", "81.2", "0.100"]
    assert len({len(line) for line in lines}) == 1


def test_rows_keep_characters_beyond_ascii(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"response": "\u03c0"}, {"response": "2"}])
    assert (tmp_path / "rows.jsonl").read_text(encoding="utf-8") == '{"response": "\u03c0"}\n{"response": "2"}\n'
