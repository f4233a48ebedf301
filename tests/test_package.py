"""kd as others install and import it: from a wheel, without its checkout, without torch."""

import json
import os
import subprocess
import sys
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pydantic
import pytest
from tiny import ROOT

import kd

SETUP = ConfigParser()
SETUP.read(ROOT / "setup.cfg")
HEAVY = {"torch", "transformers", "deepspeed", "datasets", "triton"}


def run_python(code: str, cwd: Path, *options: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.process
def test_what_a_check_on_a_login_node_imports_is_light():
    code = f"""
import sys
import kd
assert kd.load_recipe("tiny_trunc50").run.name == "tiny_trunc50"
assert kd.Recipe and kd.__version__
import kd.cli, kd.recipe, kd.files, kd.hub, kd.report.render
print(sorted({HEAVY} & set(sys.modules)))
"""
    assert run_python(code, ROOT, PYTHONPATH=str(ROOT)).strip() == "[]"


def test_every_public_name_is_there_on_first_use():
    assert {name for name in kd.__all__ if getattr(kd, name) is None} == set()
    assert kd.distillation_loss.__module__.startswith("kd.losses")
    with pytest.raises(AttributeError, match="nonsense"):
        kd.nonsense  # noqa: B018


def test_the_version_is_that_of_setup_cfg_and_says_so_where_nothing_is_installed(monkeypatch):
    def not_found(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", {"distill-trunc": "1.2.3"}.__getitem__)
    assert kd.__version__ == "1.2.3"
    monkeypatch.setattr(metadata, "version", not_found)
    assert kd.__version__ == "0+not.installed"


def test_setup_cfg_lists_every_package_of_kd():
    folders = {path.parent for path in (ROOT / "kd").rglob("__init__.py")}
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    listed = set(SETUP["options"]["packages"].split())
    assert {name for name in listed if not name.startswith("kd._shipped.")} == found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which a wheel of this checkout is installed, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    # Whatever a build leaves behind goes there too, so that no old file comes into the wheel.
    config = folder / "build.cfg"
    config.write_text(f"[build]\nbuild_base = {folder}/build\n[egg_info]\negg_base = {folder}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    environment = {**os.environ, "DIST_EXTRA_CONFIG": str(config)}
    subprocess.run(wheel, cwd=folder, env=environment, check=True, timeout=60)
    install = [*pip, "install", "--no-deps", "--no-compile", "--target", str(folder / "site")]
    (file,) = folder.glob("*.whl")
    subprocess.run([*install, str(file)], cwd=folder, check=True, timeout=60)
    return folder / "site"


def from_wheel(site: Path, code: str) -> str:
    """What code prints in a process that sees the wheel, pydantic and the standard library."""
    libraries = str(Path(pydantic.__file__).parents[1])
    # -I -S: no checkout by an editable install or PYTHONPATH; the libraries come after the wheel.
    start = f"import sys; sys.path[:0] = [{str(site)!r}]; sys.path.append({libraries!r})\n"
    return run_python(start + code, site.parent, "-I", "-S")


@pytest.mark.process
def test_a_wheel_loads_recipes_and_their_inputs_without_a_checkout(site):
    code = f"""
import json, sys
import kd
from kd.recipe import DS_CONFIGS_DIR, RECIPES_DIR, find_input, load_recipe
assert not {HEAVY} & set(sys.modules)
tiny = load_recipe("tiny_trunc50")
print(json.dumps({{
    "file": kd.__file__,
    "version": kd.__version__,
    "keep_fraction": load_recipe("qwen7b_to_1p5b_trunc50").truncation.keep_fraction,
    "names": sorted(path.name for path in RECIPES_DIR.glob("**/*.toml")),
    "json": sorted(path.name for path in DS_CONFIGS_DIR.glob("*.json")),
    "shapes": sorted(path.name for path in RECIPES_DIR.glob("shapes/*.json")),
    "models": [str(find_input(model.model)) for model in (tiny.teacher, tiny.student)],
}}))
"""
    found = json.loads(from_wheel(site, code))
    assert Path(found["file"]).is_relative_to(site)
    assert found["version"] == SETUP["metadata"]["version"]
    assert found["keep_fraction"] == 0.5
    assert found["names"] == sorted(path.name for path in (ROOT / "recipes").glob("**/*.toml"))
    assert found["json"] == sorted(path.name for path in (ROOT / "ds_configs").glob("*.json"))
    assert found["shapes"] == sorted(p.name for p in (ROOT / "recipes/shapes").glob("*.json"))
    for model in found["models"]:
        assert Path(model).is_relative_to(site)
        assert (Path(model) / "model.safetensors").is_file()


@pytest.mark.process
def test_a_wheel_holds_every_file_of_kd(site):
    def files(root: Path) -> set[str]:
        folder = root / "kd"
        return {
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if path.is_file() and not {"__pycache__", "_shipped"} & set(path.parts)
        }

    assert files(site) == files(ROOT)
    assert "py.typed" in files(site)
