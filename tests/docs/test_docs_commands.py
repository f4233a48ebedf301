"""What README.md and docs/ say of commands, flags, recipe keys and files is so.

Commands that only look (--check, --dry-run, plans, audits) are run, in this process.
"""

import contextlib
import functools
import io
import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from doc_pages import PAGES, expanded, fenced, in_backticks
from tiny import ROOT

from kd.demo.arithmetic import ArithmeticSet, draw_rows
from kd.recipe import Recipe, key_facts, load_recipe

# A recipe in the place of NAME: data and models of this one need not be here to look at it ...
RECIPE = "qwen7b_to_1p5b_trunc50"
# ... and this one has data in the test's folder.
WITH_DATA = "tiny_trunc50"
NEEDS_DATA = ("launch/audit.py",)
LOOKS_ONLY = {"--check", "--dry-run"}
FOLDERS = "kd|launch|benchmarks|recipes|ds_configs|tests|examples|docs"


class Command(NamedTuple):
    page: str
    script: str
    words: tuple[str, ...]


def commands() -> list[Command]:
    """Each call of a script of launch/ in a block of shell."""
    found = []
    for page in PAGES:
        for block in fenced(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                scripts = [i for i, word in enumerate(words) if word.startswith("launch/")]
                for i in scripts[:1]:
                    found.append(Command(page.name, words[i], tuple(words[i + 1 :])))
    return found


def is_run(command: Command) -> bool:
    looks = command.script in ("launch/plan.py", "launch/audit.py")
    # Hosts, images and run folders of the reader are not here
    is_here = not {"HOSTS", "RUN", "--hostfile"} & set(command.words)
    return is_here and (looks or bool(LOOKS_ONLY & set(command.words)))


def shown(command: Command) -> str:
    return f"{command.page}: {command.script} {' '.join(command.words)}"


def call(script: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a script prints, run in this process as its main()."""
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", [script, *words])
    output = io.StringIO()
    status: int | str | None = None
    with contextlib.redirect_stdout(output):
        try:
            runpy.run_path(str(ROOT / script))["main"]()
        except SystemExit as end:
            status = end.code
    assert not status, f"{script} {words} ends with status {status}"
    return output.getvalue()


@functools.cache
def flags_of(script: str) -> frozenset[str]:
    if script.endswith(".py"):
        with pytest.MonkeyPatch.context() as patch:
            text = call(script, ["--help"], patch)
    else:
        text = (ROOT / script).read_text()
    return frozenset(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text))


def test_there_are_commands():
    assert len(commands()) > 30
    assert len(runnable()) > 5


@pytest.mark.parametrize("called", sorted({command.script for command in commands()}))
def test_every_script_is_there_and_takes_the_flags_that_the_pages_give_it(called):
    assert (ROOT / called).is_file()
    flags = flags_of(called) if called.endswith((".py", ".sh")) else frozenset()
    for command in commands():
        if command.script == called:
            # After -- they are another program's; a script that hosts.sh starts has its own
            words = command.words[: (*command.words, "--").index("--")]
            given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
            known = flags | flags_of("launch/train.py") if called.endswith(".sh") else flags
            assert given <= known, shown(command)


@pytest.fixture(scope="module")
def with_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `make demo` leaves, from which the tiny recipes are run."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "build" / "tiny").mkdir(parents=True)
    sets = {"traces": "training", "selection": "selection", "report": "report"}
    for name, split in sets.items():
        rows = draw_rows(ArithmeticSet(split, 200), seed="docs")
        lines = [json.dumps(row) for row in rows]
        (folder / "build" / "tiny" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "modules.sh").write_text("true\n")
    return folder


def as_case(command: Command) -> object:
    """launch/submit.py asks the cluster, where there is one."""
    marks = [pytest.mark.process] if command.script == "launch/submit.py" else []
    return pytest.param(command, marks=marks, id=shown(command))


def runnable() -> list[Command]:
    """Each once, wherever it is printed."""
    return list({command[1:]: command for command in commands() if is_run(command)}.values())


@pytest.mark.parametrize("command", [as_case(command) for command in runnable()])
def test_commands_that_only_look_run_as_they_are_printed(
    command: Command, with_data: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(with_data)
    name = WITH_DATA if command.script in NEEDS_DATA else RECIPE
    words = [name if word == "NAME" else word for word in command.words]
    assert len(call(command.script, words, monkeypatch)) > 100


def test_every_override_of_a_command_is_one_that_a_recipe_takes():
    lines = [line for page in PAGES for block in fenced(page, "bash") for line in block.split("\n")]
    text = "\n".join([*lines, *(part for page in PAGES for part in in_backticks(page))])
    overrides = set(re.findall(r"--set ('[^']+'|[^\s`']+)", text))
    assert len(overrides) > 10
    for override in overrides:
        name, _, value = override.strip("'").partition("=")
        if name != "section.key":
            load_with(f"{name}={_filled(value)}")


def load_with(override: str) -> Recipe:
    """A recipe that takes [rollout] keys only with the section, and a server only of a teacher."""
    more = ["rollout.source=teacher"] if override.startswith("rollout.server") else []
    if override.startswith("training.evaluate_every"):
        more = ["training.selection_path=selection.jsonl"]
    return load_recipe("tiny_trunc50", [*more, override])


def _filled(value: str) -> str:
    """A value in the place of a capital that stands for one."""
    return {"N": "4", "X": "0.5"}.get(value, value)


def test_every_toml_block_is_part_of_a_recipe_that_loads(tmp_path):
    blocks = [(page, block) for page in PAGES for block in fenced(page, "toml")]
    assert len(blocks) > 3
    for number, (page, block) in enumerate(blocks):
        path = tmp_path / f"{page.stem}{number}.toml"
        base = "" if re.search(r"^base =", block, re.MULTILINE) else 'base = "tiny"\n'
        if "[[data.sources]]" in block:  # in the place of the base's data.path
            base = '[teacher]\nmodel = "teacher"\n[student]\nmodel = "student"\n'
        path.write_text(base + block)
        load_recipe(str(path))


def test_every_key_of_a_recipe_that_is_named_exists():
    names = set()
    for page in PAGES:
        for text in in_backticks(page):
            found = re.match(r"([a-z]+\.[a-z_]+)(\.\w+)?( = .*)?$", text)
            if found and found[1].partition(".")[0] in Recipe.model_fields:
                names.add(found[1])
    files = {"data.json"}
    assert len(names) > 30
    assert names - files <= key_facts().keys()


def test_every_path_that_is_named_exists():
    paths = set()
    for page in PAGES:
        for text in in_backticks(page):
            for word in text.split():
                if re.fullmatch(rf"(?:{FOLDERS})/[\w./*{{}},-]*", word):
                    paths.add(word)
    missing = [path for path in paths if not all(map(_is_there, expanded(path)))]
    assert len(paths) > 30
    assert not missing


def _is_there(path: str) -> bool:
    return "NAME" in path or any(ROOT.glob(path.rstrip("/")))
