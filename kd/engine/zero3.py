"""The only module that knows how ZeRO-3 stores parameters: loading, gathering, consolidation."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import GatheredParameters, Init
from deepspeed.utils import set_z3_leaf_modules
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

from kd.engine.engine import Engine
from kd.errors import UserError

# In configurations
NUM_EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
)


@contextlib.contextmanager
def partitioned_loading(ds_config: dict[str, Any]) -> Iterator[None]:
    """Inside, from_pretrained() gives every rank its shard only, when ds_config is stage 3."""
    # transformers keeps a weak reference: ours keeps it alive
    handle = HfDeepSpeedConfig(ds_config)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del handle


def repartition(
    model: PreTrainedModel, group: dist.ProcessGroup, ds_config: dict[str, Any]
) -> None:
    """Divide the parameters of a partitioned model over the ranks of `group` instead.

    transformers cannot load into groups: only rank 0 reads the checkpoint, and other groups would
    keep their random start. Done here module by module, so that no rank holds more than its shards
    and one module.

    Collective: every rank must call this. Before the model's engine is made.
    """
    moved: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter stays one
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        new = [parameter for parameter in own.values() if parameter not in moved]
        with gathered(*new):
            moved |= {
                p: nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in new
            }
        for name, parameter in own.items():
            module.register_parameter(name, moved[parameter])
        if new:
            Init(module=module, data_parallel_group=group, config_dict_or_path=ds_config)


def gathered(*parameters: torch.Tensor | None) -> contextlib.AbstractContextManager[None]:
    """Inside, the given parameters are whole, for reading. Plain parameters pass unchanged.

    Collective: every rank must enter it.
    """
    partitioned = [p for p in parameters if p is not None and hasattr(p, "ds_id")]
    return (
        GatheredParameters(partitioned, modifier_rank=None)
        if partitioned
        else contextlib.nullcontext()
    )


@contextlib.contextmanager
def whole_and_unhooked(engine: Engine, model: PreTrainedModel) -> Iterator[None]:
    """Inside, a partitioned model is whole, and runs as a plain module: without it, hooks would
    gather and partition each layer again for every token that it generates.

    Collective: every rank must enter it.
    """
    optimizer = engine.optimizer  # of an engine for inference the offload itself
    offload: Any = getattr(optimizer, "parameter_offload", optimizer)
    offload.partition_all_parameters()  # what a forward pass has left, or fetched ahead
    offload._remove_module_hooks()
    offload.forward_hooks, offload.backward_hooks = [], []
    try:
        with gathered(*model.parameters()):
            yield
    finally:
        offload.setup_zero_stage3_hooks()


def is_partitioned(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether ZeRO-3 divides any of them over ranks."""
    return any(hasattr(parameter, "ds_id") for parameter in parameters)


def set_leaf_modules(model: PreTrainedModel) -> list[str]:
    """Make each decoder layer one unit of gathering, and in a model without known ones each
    mixture-of-experts block: hooks run once a layer and not around each of its modules, and ranks
    that route differently stay in step.

    Returns the class names of these modules, an empty list for a model without either. Raises
    UserError for a model with experts in none of them: it would hang.
    """
    leaves = {type(layer) for layer in decoder_layers(model)} or {
        type(module) for module in model.modules() if _is_moe_block(module)
    }
    # A leaf's gradients are reduced when it has run backward: too early for a parameter that
    # another module uses too.
    shared = _shared_parameters(model)
    for module in model.modules():
        if type(module) in leaves and not shared.isdisjoint(module.parameters()):
            leaves.discard(type(module))
    if leaves:
        set_z3_leaf_modules(model, sorted(leaves, key=lambda kind: kind.__name__))
    config = model.config.get_text_config()
    counts = (getattr(config, name, None) for name in NUM_EXPERTS)
    has_experts = any(count and count > 1 for count in counts)
    if has_experts and not leaves:
        raise UserError(
            f"{type(model).__name__} has experts, but no mixture-of-experts block in it is "
            "recognised, so it would hang under ZeRO-3: use a dense model, or add the block's "
            "class name to kd/engine/zero3.py"
        )
    return sorted(kind.__name__ for kind in leaves)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Those that transformers names as not to be split between devices, in their list."""
    names = set(model._no_split_modules or ())
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return [layer for some in lists for layer in some if type(layer).__name__ in names]


def _shared_parameters(model: PreTrainedModel) -> set[nn.Parameter]:
    """Held by several modules, as a tied lm_head's."""
    counts = Counter(
        parameter for module in model.modules() for parameter in module.parameters(recurse=False)
    )
    return {parameter for parameter, count in counts.items() if count > 1}


def fetching_layers(ds_config: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """ds_config with a prefetch bucket that holds a decoder layer of this model: with a smaller one
    the next layer is never fetched whole while this one runs.
    """
    largest = max(
        (num_parameters(layer.parameters()) for layer in decoder_layers(model)), default=0
    )
    zero = ds_config["zero_optimization"]
    if zero.get("stage") != 3:
        return ds_config
    bucket = max(largest, zero.get("stage3_prefetch_bucket_size", 0))
    return {**ds_config, "zero_optimization": {**zero, "stage3_prefetch_bucket_size": bucket}}


def _is_moe_block(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return name.endswith(("moeblock", "moe")) or any(
        child == "experts" for child, _ in module.named_children()
    )


def consolidated_state_dict(engine: Engine) -> dict[str, torch.Tensor] | None:
    """The module's whole state on the CPU, in the training dtype: on rank 0; other ranks may get
    None.

    Collective: every rank must call this.
    """
    if engine.zero_optimization_partition_weights():
        state: dict[str, torch.Tensor] | None = engine._zero3_consolidated_16bit_state_dict()
        return state
    return {name: tensor.detach().cpu() for name, tensor in engine.module.state_dict().items()}


def num_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """Elements of the whole parameters, partitioned or not."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter, partitioned or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


def num_shards(parameters: Iterable[nn.Parameter]) -> int:
    """Ranks that the parameters are divided over; 1 where each rank holds them whole."""
    groups = (getattr(parameter, "ds_process_group", None) for parameter in parameters)
    return max(1 if group is None else dist.get_world_size(group) for group in groups)


def shard_bytes(parameters: Iterable[torch.Tensor]) -> int:
    """Bytes that this rank now holds of the parameters: shards, and what is whole or there a second
    time (hpZ).
    """
    attributes = ("data", "ds_tensor", "ds_secondary_tensor")
    tensors = (getattr(parameter, name, None) for parameter in parameters for name in attributes)
    storages = (tensor.untyped_storage() for tensor in tensors if tensor is not None)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
