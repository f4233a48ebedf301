"""Rank 0 speaks for the run; libraries are heard when something is wrong."""

import logging
import sys
import warnings

import datasets
import transformers


def configure_logging(rank: int) -> None:
    """Rank 0's own lines on stderr; every rank's warnings; progress bars of rank 0 only."""
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    if rank:  # every rank reads the same tokenizer and template, and would say the same of them
        logging.getLogger("kd.data").setLevel(logging.ERROR)
    for name in ("DeepSpeed", "httpx", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that PyTorch is about to rename.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    transformers.utils.logging.disable_progress_bar()
    if rank or not sys.stderr.isatty():
        datasets.disable_progress_bars()
