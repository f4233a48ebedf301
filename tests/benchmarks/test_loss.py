"""The benchmark of the loss as a user calls it: cells, rows, skips, budget and table."""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, replace

import loss
import pytest
from peers import PEERS, Shape
from tiny import ROOT

pytestmark = pytest.mark.benchmark

TINY = ("--device", "cpu", "--shapes", "16,24,64", "--num-tokens", "32", "--divergences", "jsd")
CELL = loss.Cell("ours", "jsd", Shape(16, 24, 64), 32, "float32", "cpu", 1, 0.05)
SPREAD = {"median": 2.0, "p20": 1.5, "p80": 2.5}
ERRORS = {
    "kl": 0.05,
    "num_tokens": 32,
    "vocab_size": 64,
    "loss": 1e-6,
    "grad_hidden": 2e-6,
    "grad_head": None,
}
MEASURED = {
    "status": "measured",
    "peak_gib": 0.25,
    "num_rounds": 9,
    "ms": SPREAD,
    "tflops": 0.125,
    "bare_floor_ms": SPREAD,
    "bare_floor_rows": 16,
    "bare_floor_fraction": 0.75,
    "planned_floor_ms": SPREAD,
    "planned_floor_rows": [16, 4],
    "planned_floor_fraction": 0.875,
    "errors": {"random": ERRORS, "matched": ERRORS},
}


def command_line(*arguments):
    """A call of the script as a user makes it."""
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "loss.py"), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def run_main(monkeypatch, tmp_path, capsys):
    """run_main(source, *arguments) runs main() on two peers, with `source` as each cell's process:
    (rows, output).
    """

    def run(source, *arguments, commit="c0ffee"):
        monkeypatch.setattr(loss, "cell_command", lambda cell: [sys.executable, "-c", source])
        fixed = ("--peers", "ours", "eager", "--commit", commit, "--output", str(tmp_path))
        monkeypatch.setattr(sys, "argv", ["loss.py", *TINY, *fixed, *arguments])
        loss.main()
        path = tmp_path / "loss_cpu.json"
        return json.loads(path.read_text())[
            "rows"
        ] if path.exists() else [], capsys.readouterr().out

    return run


def test_cells_are_measured_written_and_skipped_the_second_time(tmp_path):
    peers = ("--peers", "ours", "eager", "ours_torch")
    arguments = (*TINY, *peers, "--measure-seconds", "0.05", "--output", str(tmp_path))
    first = command_line(*arguments)
    assert first.returncode == 0, first.stderr
    results = json.loads((tmp_path / "loss_cpu.json").read_text())
    assert results["environment"]["packages"]["torch"]
    assert results["command"].startswith("python benchmarks/loss.py --device cpu")
    ours, eager, on_gpu = results["rows"]
    for row in (ours, eager):
        assert row["status"] == "measured"
        assert row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"]
        assert row["tflops"] == pytest.approx(
            2 * 32 * 64 * (3 * 16 + 24) / row["ms"]["median"] / 1e9
        )
        assert row["bare_floor_fraction"] > 0
        assert row["planned_floor_fraction"] > 0
        assert row["peak_gib"] >= 0
        for case in row["errors"].values():
            assert max(case["loss"], case["grad_hidden"], case["grad_head"]) < 1e-4
        assert row["num_threads"] == 1
        assert {"commit", "hardware", "versions"} <= set(row)
    assert on_gpu["status"] == "not applicable: needs cuda"
    assert (tmp_path / "loss_cpu.md").read_text() == loss.markdown(results)

    second = command_line(*arguments)
    assert (second.returncode, second.stdout) == (0, "")
    assert json.loads((tmp_path / "loss_cpu.json").read_text())["rows"] == results["rows"]


def test_the_table_is_made_from_the_json_alone(run_main, tmp_path):
    run_main(f"print('log'); print({json.dumps(MEASURED)!r})")
    table = (tmp_path / "loss_cpu.md").read_text()
    (tmp_path / "loss_cpu.md").unlink()
    rendered = command_line("--render", str(tmp_path / "loss_cpu.json"))
    assert rendered.returncode == 0, rendered.stderr
    assert (tmp_path / "loss_cpu.md").read_text() == table
    errors = "1.0e-06, 2.0e-06, not finite"
    assert (
        f"| ours | 32 | 2 (1.5-2.5) | 0.125 | 75% | 88% | 0.25 | {errors} | {errors} | c0ffee |"
        in table
    )
    assert "- eager, 32 tokens: bare floor in slices of 16 rows" in table
    assert "random pair 0.05" in table


def test_rows_of_another_commit_are_measured_again_and_replaced(run_main):
    older, _ = run_main(f"print({json.dumps(MEASURED)!r})")
    newer = MEASURED | {"peak_gib": 0.5}
    rows, output = run_main(f"print({json.dumps(newer)!r})", "--peers", "eager", commit="beef")
    assert [(row["peer"], row["commit"], row["peak_gib"]) for row in rows] == [
        ("ours", "c0ffee", 0.25),
        ("eager", "beef", 0.5),
    ]
    assert rows[0] == older[0]
    assert output.count("eager") == 1


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("raise RuntimeError('boom')", "failed with exit status 1: RuntimeError: boom"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "out of memory"),
        (
            'raise RuntimeError("DefaultCPUAllocator: can\'t allocate memory: 8 bytes")',
            "out of memory",
        ),
        ("raise SystemExit(3)", "failed with exit status 3: no message"),
    ],
)
def test_a_peer_that_fails_is_a_row_and_the_next_one_runs(run_main, tmp_path, source, status):
    rows, output = run_main(source)
    assert [(row["peer"], row["status"]) for row in rows] == [("ours", status), ("eager", status)]
    assert output.count(status) == 2
    assert f"- ours, 32 tokens: {status}" in (tmp_path / "loss_cpu.md").read_text()


def test_a_peer_that_is_not_installed_is_a_row(monkeypatch):
    monkeypatch.setitem(PEERS, "ours", replace(PEERS["trl"], package="no_such_package"))
    row = loss.run_cell(CELL, deadline=None)
    assert row == {"status": "not installed: no_such_package; it is in the extra 'bench'"}


def test_a_process_that_hangs_is_ended_and_is_a_row(monkeypatch):
    monkeypatch.setattr(loss, "CELL_LIMIT_S", 1)
    monkeypatch.setattr(
        loss, "cell_command", lambda cell: [sys.executable, "-c", "import time; time.sleep(60)"]
    )
    assert loss.run_cell(CELL, deadline=None) == {"status": "failed: no result after 1 s"}


def test_the_budget_ends_the_run_with_what_it_has(run_main):
    rows, output = run_main("import time; time.sleep(60)", "--seconds", "1")
    assert rows == []
    assert "1 s are over: 2 of 2 cells not reached" in output


def test_on_cuda_the_main_peers_come_first_and_every_cell_once():
    arguments = argparse.Namespace(
        device="cuda",
        peers=["all"],
        shapes=None,
        num_tokens=None,
        divergences=["forward_kl", "jsd", "reverse_kl"],
        threads=None,
        measure_seconds=None,
    )
    cells = loss.ordered_cells(arguments)
    main_peers = ("ours", "ours_bf16_logits", "liger_compiled", "trl", "eager")
    head = [(tokens, peer) for tokens in (8192, 32768) for peer in main_peers]
    assert [(cell.num_tokens, cell.peer) for cell in cells[:10]] == head
    assert {(cell.shape, cell.divergence) for cell in cells[:10]} == {
        (Shape(1536, 3584, 151936), "forward_kl")
    }
    assert len(cells) == len(set(cells)) == 3 * 3 * 5 * len(PEERS)
    assert {cell.dtype for cell in cells} == {"bfloat16"}


def test_a_cell_survives_the_way_to_its_process():
    assert loss._cell(json.dumps(asdict(CELL))) == CELL
    assert loss.cell_command(CELL)[-1] == json.dumps(asdict(CELL))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shapes", "16,24"), "argument --shapes: '16,24' must be three sizes"),
        (("--shapes", "16,x,64"), "argument --shapes: 'x' must be a whole number"),
        (("--num-tokens", "0"), "argument --num-tokens: '0' must be a whole number of at least 1"),
        (("--divergences", "kl"), "argument --divergences: invalid choice: 'kl'"),
        (("--peers", "nobody"), "argument --peers: invalid choice: 'nobody'"),
        (("--seconds", "-1"), "argument --seconds: '-1' must be a whole number"),
        (
            ("--measure-seconds", "nan"),
            "argument --measure-seconds: 'nan' must be a number of seconds",
        ),
        (("--threads", "1.5"), "argument --threads: '1.5' must be a whole number"),
        (("--render", "missing.json"), "argument --render: 'missing.json' is no file"),
        (("--device", "cuda"), "argument --device: cuda, but torch sees no CUDA device"),
    ],
)
def test_a_bad_argument_is_one_error_that_names_it(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["loss.py", *arguments])
    monkeypatch.setattr(loss.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        loss.parse_arguments()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_changed_checkout_is_told_apart_by_its_changes_but_results_are_no_code(
    monkeypatch, tmp_path
):
    def git(*arguments):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            cwd=tmp_path,
            check=True,
        )

    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "loss_cpu.json").write_text("{}")
    (tmp_path / "code.py").write_text("1")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "code")
    monkeypatch.delenv("KD_COMMIT", raising=False)
    monkeypatch.setattr(loss, "ROOT", tmp_path)
    monkeypatch.setattr(loss, "environment", lambda: {"commit": "abc+"})
    (results / "loss_cpu.json").write_text('{"rows": []}')
    assert loss.code_commit() == "abc"
    seen = set()
    for text in ("2", "3"):
        (tmp_path / "code.py").write_text(text)
        seen.add(loss.code_commit())
    assert len(seen) == 2
    assert all(commit.startswith("abc+") for commit in seen)
