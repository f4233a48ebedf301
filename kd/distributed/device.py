"""Which kind of device a run uses: DeepSpeed's accelerator decides, so that DS_ACCELERATOR=cpu
holds everywhere.
"""

from typing import Literal

from deepspeed.accelerator import get_accelerator


def device_type() -> Literal["cuda", "cpu"]:
    """cuda or cpu, the latter also on a machine with GPUs that are not to be used."""
    return "cuda" if get_accelerator().device_name() == "cuda" else "cpu"
