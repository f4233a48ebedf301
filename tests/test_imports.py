"""Imports of kd point one way; one package knows deepspeed, and one module knows deepspeed.zero."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BASE = {"constants", "errors", "files", "recipe", "hub"}

# package or module of kd -> what of kd it may import; itself always
ALLOWED = {
    "__init__": {"losses"},
    "constants": set(),
    "errors": set(),
    "files": set(),
    "recipe": {"errors"},
    "hub": {"errors", "recipe"},
    "ports": set(),
    "cli": {"constants", "errors"},
    "interruption": set(),
    "watchdog": {"constants"},
    "logs": set(),
    "metrics": {"files"},
    "schedule": {"recipe"},
    "tasks": {"cli", "errors", "files", "metrics"},
    "losses": BASE,
    "data": BASE,
    "diagnostics": {"data", "losses"},
    "engine": BASE | {"interruption", "ports"},
    "models": BASE | {"losses", "engine"},
    "plan": BASE | {"data", "engine", "losses", "metrics", "models"},
    "preflight": BASE | {"agreement", "check", "engine", "launcher", "models", "plan", "ports"},
    "build": BASE | {"engine", "models", "plan"},
    "run_folder": BASE | {"engine", "lock", "metrics"},
    "check": BASE | {"engine", "evaluate"},
    "sbatch": {"errors", "recipe"},
    "lock": {"errors"},
    "launcher": {"ports", "recipe"},
    "study": BASE | {"check", "data", "evaluate", "launcher", "lock", "run_folder"},
    "submit": BASE | {"check", "metrics", "plan", "run_folder", "sbatch"},
    "agreement": BASE | {"engine", "metrics"},
    "report": {"errors", "files", "metrics", "evaluate"},
    "evaluate": BASE | {"data", "lock", "models", "metrics"},
    "audit": BASE | {"data", "evaluate"},
    "train": BASE
    | {"agreement", "build", "data", "diagnostics", "engine", "interruption", "logs", "losses", "metrics"}
    | {"models", "plan", "run_folder", "schedule", "watchdog"},
}


def imports_of(path: Path) -> list[str]:
    """Dotted names of everything a file imports, at any depth."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def files_of_kd() -> list[Path]:
    return sorted((ROOT / "kd").rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "kd").with_suffix("").parts[0]


@pytest.mark.parametrize("path", files_of_kd(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    part = part_of(path)
    assert part in ALLOWED, f"{part} has no place in the order of imports yet"
    for name in imports_of(path):
        if name.startswith("kd."):
            target = name.split(".")[1]
            assert target == part or target in ALLOWED[part], f"{path} must not import kd.{target}"


def test_models_reach_into_the_engine_only_for_zero3_its_json_and_the_device():
    for path in (ROOT / "kd" / "models").glob("*.py"):
        for name in imports_of(path):
            if name.startswith("kd.engine"):
                assert name.split(".")[2] in {"zero3", "ds_config", "device"}, f"{path}: {name}"


def test_deepspeed_is_known_to_the_engine_alone_and_its_zero_to_one_module():
    for path in files_of_kd():
        for name in imports_of(path):
            if name.split(".")[0] == "deepspeed":
                assert part_of(path) == "engine", f"{path} imports {name}"
            if "zero" in name and name.startswith("deepspeed"):
                assert path.name == "zero3.py", f"{path} imports {name}"


def test_commands_import_nothing_but_kd():
    for path in (ROOT / "launch").glob("*.py"):
        for name in imports_of(path):
            assert name.split(".")[0] not in {"deepspeed"}, f"{path} imports {name}"
