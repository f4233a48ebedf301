"""A study, cell by cell: each is trained, unless it was, and scored; a new start continues.

STUDY/study.json       the cells, and how far each is
STUDY/CELL/            the run of a cell, with evaluation/[TASK/]export-best.json
STUDY/recipes/, logs/  of each cell: its resolved recipe, and what training and evaluation printed
STUDY/references/      scores of the teacher, and of the student before training
STUDY/cache/           with --cache: what the teacher says of all traces, once for all cells
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil

from kd.cluster.local import local_launch
from kd.data.dataset import load_data
from kd.data.tokenizers import load_tokenizers
from kd.errors import Interrupted, NothingToLearn, UserError
from kd.evaluate.evaluation import is_scored, result_files
from kd.evaluate.results import read_results
from kd.evaluate.tasks import check_evaluation
from kd.recipe import ROOT
from kd.runs.check import check_recipe
from kd.runs.folder import INTERRUPTED, SUCCESS, check_same_run
from kd.runs.lock import hold, is_free
from kd.runs.records import FILLED
from kd.study.cells import Cell, Outcome, Point, Study, recipe_file, write_study
from kd.training.fill_cache import check_request

log = logging.getLogger(__name__)

LAUNCHER_MODULE = "deepspeed.launcher"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def check_study(study: Study) -> None:
    """Everything that can be known before the first cell starts. Raises UserError."""
    if study.cache_request is not None:
        check_request(study.cells[0].recipe, study.cache_request, study.cache)
    for cell in study.cells:
        check_recipe(cell.recipe, awaits_cache=study.awaits_cache)
        check_same_run(cell.recipe)
    check_evaluation(study.cells[0].recipe)


class Runner:
    """Runs the cells of a study in turn on this machine, or on a hostfile's hosts."""

    def __init__(self, study: Study, hostfile: Path | None = None, restarts: int = 0) -> None:
        """restarts: of each cell on the hosts, as launch/hosts.sh has it."""
        self.study, self.hostfile, self.restarts = study, hostfile, restarts
        self.outcomes: dict[Point, Outcome] = {}
        self._child: subprocess.Popen[bytes] | None = None
        self._num_told = 0

    def run(self) -> Iterator[tuple[Cell, Outcome]]:
        """Each cell with its outcome, as it comes. A cell that fails does not stop the others.

        Raises Interrupted after a signal, once the cell at work has saved; UserError for what ends
        the whole study.
        """
        hold(self.study.folder, patience_seconds=5)
        check_study(self.study)
        self._train_command(self.study.cells[0])  # whether the GPUs here can divide the batch
        write_study(self.study, self.outcomes)
        with self._signals():
            self._fill_cache()
            for cell in self.study.cells:
                outcome = self._outcome(cell)
                self.outcomes[cell.point] = outcome
                write_study(self.study, self.outcomes)
                yield cell, outcome
            self._score_references()

    def _fill_cache(self) -> None:
        """Once for all cells, which differ only in what they read of it."""
        study = self.study
        if study.cache_request is None:
            return
        command, environment = local_launch(study.cells[0].recipe, ROOT / "launch" / "cache.py")
        recipe = ["--recipe", str(recipe_file(study, study.cells[0]))]
        options = [*recipe, "--output", str(study.cache), *study.cache_request.words]
        self._call([*command, *options], environment, "cache", leaves=[study.cache / FILLED])

    def _outcome(self, cell: Cell) -> Outcome:
        run, name = cell.recipe.run_dir, cell.point.name
        try:
            self._wait_for(run)  # of a study that was killed: its training goes on
            if not (run / SUCCESS).exists():
                load_data(cell.recipe, load_tokenizers(cell.recipe))
                self._train(cell)
            # Without a best one its checkpoint was damaged, and the log says so.
            export = next(
                path for path in (run / "export" / "best", run / "export" / "last") if path.exists()
            )
            scores = result_files(cell.recipe, run / "evaluation", f"export-{export.name}")
            if not is_scored(cell.recipe, scores):
                self._call(*self._score_command(cell, export), name, leaves=scores)
            text = ", ".join(map(describe, scores))
        except NothingToLearn as error:
            return Outcome("no_supervised_token", str(error))
        except UserError as error:
            return Outcome("failed", str(error))
        finally:
            if self._num_told:
                self._wait_for(run)
        return Outcome("done", text)

    def _score_references(self) -> None:
        """With the recipe of the first cell: they do not depend on what is trained on."""
        cell, folder = self.study.cells[0], self.study.folder / "references"
        models = {}
        if cell.recipe.student.init == "pretrained":
            models["student-before"] = cell.recipe.student.model
        if cell.recipe.teacher is not None:
            models["teacher"] = cell.recipe.teacher.model
        for label, model in models.items():
            scores = result_files(cell.recipe, folder, label)
            if not is_scored(cell.recipe, scores):
                command, environment = self._score_command(cell, model)
                self._call(
                    [*command, "--label", label, "--output", str(folder)],
                    environment,
                    label,
                    leaves=scores,
                )

    def _train(self, cell: Cell) -> None:
        """Raises Interrupted also when only the ranks were told to stop, as on preemption."""
        run = cell.recipe.run_dir
        try:
            self._call(*self._train_command(cell), cell.point.name, leaves=[run / SUCCESS])
        except UserError:
            if (run / INTERRUPTED).exists():
                raise Interrupted from None
            raise

    def _train_command(self, cell: Cell) -> tuple[list[str], dict[str, str]]:
        recipe = ["--recipe", str(recipe_file(self.study, cell))]
        if self.hostfile is not None:
            script = ["bash", str(ROOT / "launch" / "hosts.sh"), "--restarts", str(self.restarts)]
            return [*script, str(self.hostfile), *recipe], dict(os.environ)
        command, environment = local_launch(cell.recipe, ROOT / "launch" / "train.py")
        return [*command, *recipe, "--resume", "auto"], environment

    def _score_command(self, cell: Cell, model: Path | str) -> tuple[list[str], dict[str, str]]:
        script = [
            sys.executable,
            str(ROOT / "launch" / "evaluate.py"),
            "--recipe",
            str(recipe_file(self.study, cell)),
        ]
        return [*script, "--model", str(model)], dict(os.environ)

    def _call(
        self, command: list[str], environment: dict[str, str], name: str, *, leaves: list[Path]
    ) -> None:
        """Run a command, with its output in logs/. What it leaves decides, not its status.

        Raises Interrupted when a signal came, and UserError with its last lines when a file is
        missing.
        """
        path = self.study.folder / "logs" / f"{name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as output:
            begin = output.tell()
            # A session of its own: Ctrl-C is for this process, which passes it on as TERM.
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
            if self._num_told:
                self._child.terminate()
            status = self._child.wait()
            self._end_session(self._child.pid)
            self._child = None
        if self._num_told:
            raise Interrupted
        if not all(file.exists() for file in leaves):
            with path.open("rb") as file:
                file.seek(begin)
                said = file.read().decode(errors="replace").strip().splitlines() or ["nothing"]
            raise UserError(f"status {status}; {path} ends with:\n" + "\n".join(said[-3:]))

    def _end_session(self, session: int) -> None:
        """After a signal, wait for what a command leaves behind: ranks whose launcher is gone, told
        until they end.
        """
        while self._num_told == 1 and (left := _processes_of(session)):
            for process in left:
                with contextlib.suppress(psutil.Error):
                    if LAUNCHER_MODULE not in " ".join(process.cmdline()):
                        process.terminate()
            time.sleep(0.5)

    def _wait_for(self, run: Path) -> None:
        """Until no rank is left in a run's folder: they save when their launcher has gone. A second
        signal ends it.
        """
        is_said = False
        while not is_free(run) and self._num_told < 2:
            if not is_said:
                log.info("waiting for the ranks in %s", run)
                is_said = True
            time.sleep(0.2)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        ignored = (signal.SIG_IGN,)  # by nohup, say
        numbers = [number for number in SIGNALS if signal.getsignal(number) not in ignored]
        before = {number: signal.signal(number, self._tell) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self._num_told += 1
        if self._child is not None:
            self._child.terminate()


def _processes_of(session: int) -> list[psutil.Process]:
    """Those that have not ended, zombies left out."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def describe(scores: Path) -> str:
    """0.943 (0.911-0.964), with the task's name before it."""
    found = read_results(scores)
    if found is None:
        raise UserError(f"{scores}: no such file: evaluate the model again")
    (low, high), name = found.ci95, f"{found.task} " if found.task else ""
    return f"{name}{found.accuracy:.3f} ({low:.3f}-{high:.3f})"
