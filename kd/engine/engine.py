"""A ZeRO engine: the one place that calls deepspeed.initialize, and what is used of its result."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, Protocol

import deepspeed
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from torch import Tensor, nn

from kd.errors import UserError


class Engine(Protocol):
    """What this project uses of a deepspeed.DeepSpeedEngine, which has no types of its own."""

    module: nn.Module
    optimizer: Any  # of DeepSpeed, another class for each stage
    checkpoint_engine: Any
    skipped_steps: int
    _config: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None: ...
    def backward(self, loss: Tensor, *, scale_wrt_gas: bool) -> Any: ...
    def step(self) -> None: ...
    def destroy(self) -> None: ...
    def get_global_grad_norm(self) -> float | None: ...
    def zero_optimization_partition_weights(self) -> bool: ...
    def _zero3_consolidated_16bit_state_dict(self) -> dict[str, Tensor] | None: ...
    def save_checkpoint(
        self, save_dir: str, *, tag: str, save_latest: bool, exclude_frozen_parameters: bool
    ) -> Any: ...
    def load_checkpoint(
        self, load_dir: str, *, tag: str, load_module_strict: bool, load_lr_scheduler_states: bool
    ) -> tuple[str | None, Any]: ...


def check_ds_config(ds_config: dict[str, Any], file: str) -> None:
    """Raise UserError if DeepSpeed itself does not accept a complete configuration, made from file:
    what its version, the accelerator and keys that depend on each other rule out.
    """
    try:
        DeepSpeedConfig(copy.deepcopy(ds_config))
    except (ValueError, TypeError, LookupError, AssertionError, DeepSpeedConfigError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file}: DeepSpeed rejects it: {reason[:500]}") from None


def initialize(module: nn.Module, ds_config: dict[str, Any]) -> Engine:
    """A ZeRO engine around the module: with an optimizer when ds_config has one, else for
    inference.
    """
    # Ranges for NVIDIA's profiler around thousands of small calls a micro-batch: a third of the
    # host's time under ZeRO-3.
    deepspeed.utils.nvtx.enable_nvtx = False
    trained = [p for p in module.parameters() if p.requires_grad]
    # Some of its optimizers print how much memory is in use, at every start.
    with contextlib.redirect_stdout(None):
        engine: Engine = deepspeed.initialize(
            model=module,
            model_parameters=trained if "optimizer" in ds_config else None,
            config=ds_config,
        )[0]
    return engine
