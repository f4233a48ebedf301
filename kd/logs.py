"""Logging: rank 0 logs for the run, and libraries log only warnings and errors."""

import logging
import sys
import warnings
from typing import TextIO

import datasets
import transformers
from tqdm import tqdm


class _AboveTheBar(logging.StreamHandler[TextIO]):
    """A line of its own on a terminal too, where a progress bar stands on the last one."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr.isatty():
            tqdm.write(self.format(record), file=sys.stderr)
        else:
            super().emit(record)


def configure_logging(rank: int) -> None:
    """On stderr: all lines of rank 0 and the warnings of every rank; progress bars on rank 0."""
    level = logging.INFO if rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", handlers=[_AboveTheBar()])
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
