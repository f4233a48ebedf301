"""Logging: rank 0 logs for the run, and libraries log only warnings and errors.

A line begins with the time of day, so that it can be read in a file hours later; a fact of the run
has a label in a column of its own (labelled()).
"""

import logging
import sys
import warnings
from typing import TextIO

import datasets
import transformers
from tqdm import tqdm

TIME_FORMAT = "%H:%M:%S"
TIME_WIDTH, LABEL_WIDTH = len("HH:MM:SS "), 10


class _AboveTheBar(logging.StreamHandler[TextIO]):
    """A line of its own on a terminal too, where a progress bar is on the last one."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr.isatty():
            tqdm.write(self.format(record), file=sys.stderr)
        else:
            super().emit(record)


class _Stamped(logging.Formatter):
    """With the time of day, under which further lines of a message begin where its first does."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", datefmt=TIME_FORMAT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record).replace("\n", "\n" + " " * TIME_WIDTH)


def labelled(label: str, text: str) -> str:
    """What a line of the log says of one thing, and all lines of the same column: a text of several
    lines stays in the column.
    """
    return f"{label:{LABEL_WIDTH}}" + text.replace("\n", "\n" + " " * LABEL_WIDTH)


def configure_logging(rank: int) -> None:
    """On stderr: all lines of rank 0 and the warnings of every rank; progress bars on rank 0."""
    level = logging.INFO if rank == 0 else logging.WARNING
    handler = _AboveTheBar()
    handler.setFormatter(_Stamped())
    logging.basicConfig(level=level, handlers=[handler])
    if rank:  # every rank reads the same tokenizer and template, and would say the same of them
        logging.getLogger("kd.data").setLevel(logging.ERROR)
    for name in ("DeepSpeed", "httpx", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that PyTorch is about to rename.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # transformers announces new names for what is called here; nobody who trains can do anything.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.utils.logging.disable_progress_bar()
    if rank or not sys.stderr.isatty():
        datasets.disable_progress_bars()
