"""Imports of kd point one way; one package knows deepspeed, and one module knows deepspeed.zero."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BASE = {"compressed", "constants", "errors", "files", "hub", "names", "ranges", "recipe"}

# module or package of kd -> what of kd it may import, besides itself and, for a package, BASE. In
# order: each line names only what stands above it.
ALLOWED = {
    "__init__": {"losses", "recipe"},
    "constants": set(),
    "errors": set(),
    "compressed": {"errors"},
    "files": {"compressed", "errors"},
    "names": {"errors"},
    "ranges": {"names"},
    "recipe": {"constants", "errors", "files", "names", "ranges"},
    "hub": {"compressed", "errors", "recipe"},
    "logs": set(),
    "cli": {"constants", "errors"},
    "losses": set(),
    "distributed": set(),
    "data": {"distributed"},
    "engine": {"distributed"},
    "models": {"data", "distributed", "engine", "losses"},
    "runs": {"distributed", "engine", "models"},
    "cache": {"losses", "runs"},
    "plan": {"cache", "data", "distributed", "engine", "losses", "models"},
    "teachers": {"cache", "data", "engine", "losses", "models"},
    "generation": {"data", "models", "runs"},
    "demo": {"cli", "runs"},
    "evaluate": {"data", "generation", "runs"},
    "audit": {"data", "evaluate", "generation"},
    "rollouts": {"data", "distributed", "generation"},
    "training": {
        "cache",
        "cli",
        "data",
        "distributed",
        "engine",
        "evaluate",
        "generation",
        "logs",
        "losses",
        "models",
        "plan",
        "rollouts",
        "runs",
        "teachers",
    },
    "cluster": {"cli", "distributed", "evaluate", "generation", "plan", "runs", "training"},
    "preflight": {"cluster", "distributed", "engine", "models", "plan", "runs"},
    "study": {"cache", "cli", "cluster", "data", "evaluate", "runs", "training"},
    "report": {"evaluate", "runs"},
    "publish": {"data", "report", "runs"},
}
PACKAGES = sorted(name for name in ALLOWED if (ROOT / "kd" / name).is_dir())


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
    allowed = ALLOWED[part] | (BASE if part in PACKAGES else set())
    for name in imports_of(path):
        if name.startswith("kd."):
            target = name.split(".")[1]
            assert target == part or target in allowed, f"{path} must not import kd.{target}"


def test_the_order_of_packages_has_no_circle():
    placed: set[str] = set()
    while left := {name for name in ALLOWED if name not in placed}:
        ready = {name for name in left if ALLOWED[name] <= placed}
        assert ready, f"a circle among {sorted(left)}"
        placed |= ready


def test_everything_at_the_root_is_free_for_all_and_the_rest_stands_in_a_package():
    at_root = {path.stem for path in (ROOT / "kd").glob("*.py")}
    assert at_root == {name for name in ALLOWED if name not in PACKAGES}


def test_modules_and_public_classes_have_names_of_their_own():
    modules, classes = Counter(), Counter()
    for path in files_of_kd():
        modules[path.stem] += path.stem != "__init__"
        body = ast.parse(path.read_text(encoding="utf-8")).body
        classes.update(
            node.name for node in body if isinstance(node, ast.ClassDef) and node.name[0] != "_"
        )
    assert [name for name, count in (modules + classes).items() if count > 1] == []
    assert len(modules) > 100


def test_models_reach_into_the_engine_only_for_what_a_model_needs():
    needed = {"ds_config", "engine", "export", "generate", "zero3"}
    for path in (ROOT / "kd" / "models").glob("*.py"):
        for name in imports_of(path):
            if name.startswith("kd.engine"):
                assert name.split(".")[2] in needed, f"{path}: {name}"


def test_deepspeed_is_known_to_two_packages_and_its_zero_to_one_module():
    for path in files_of_kd():
        for name in imports_of(path):
            if name.split(".")[0] == "deepspeed":
                assert part_of(path) in {"distributed", "engine"}, f"{path} imports {name}"
            if "zero" in name and name.startswith("deepspeed"):
                assert path.name == "zero3.py", f"{path} imports {name}"


def test_commands_import_nothing_but_kd():
    for path in (ROOT / "launch").glob("*.py"):
        for name in imports_of(path):
            assert name.split(".")[0] not in {"deepspeed"}, f"{path} imports {name}"


def test_ranks_are_asked_for_by_two_packages_only_and_passed_to_the_others():
    asked = {"get_rank", "get_world_size"}
    for path in files_of_kd():
        if part_of(path) in {"distributed", "engine"}:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node, "attr", getattr(node, "id", None))
            assert name not in asked, f"{path}:{node.lineno}: take them from the Layout"


def test_the_reference_of_the_two_rank_tests_shares_nothing_with_the_losses():
    names = imports_of(ROOT / "tests" / "training" / "full_logits.py")
    of_kd = {name for name in names if name.split(".")[0] == "kd"}
    assert of_kd == {"kd.data.collate.Batch", "kd.recipe.Recipe"}
