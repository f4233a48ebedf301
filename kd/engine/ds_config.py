"""The configuration of each engine: ZeRO from a JSON in ds_configs/, the rest from the recipe."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kd.engine.ds_schema import ZeroSection, check_ds_json
from kd.errors import UserError
from kd.files import read_json
from kd.recipe import DS_CONFIGS_DIR, Recipe

if TYPE_CHECKING:
    from kd.distributed.nodes import Nodes  # imports torch; --check reads this file without it

Role = Literal["student", "teacher"]

# What deepspeed.student = "auto" may become, the least divided first.
AUTO_STUDENTS = (
    "zero1_bf16.json",
    "zero2_bf16.json",
    "zero3_bf16.json",
    "zero3_bf16_offload.json",
)
STAGES: dict[Role, tuple[int, ...]] = {"student": (1, 2, 3), "teacher": (3,)}
# Keys of the JSON that the recipe decides, and where.
RECIPE_KEYS = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and training.micro_batch_size",
    "gradient_clipping": "training.max_grad_norm",
    "optimizer": "training.learning_rate, adam_betas, adam_eps and weight_decay",
    "scheduler": "training.schedule and warmup_fraction",
    "tensorboard": "monitor.tensorboard",
    "csv_monitor": "monitor.csv",
    "wandb": "monitor.wandb_project",
    "comet": "monitor.tensorboard, csv and wandb_project",
}


# DeepSpeed's throughput timer makes the host wait for the device in every forward and step.
QUIET = {"steps_per_print": 2**31, "timers": {"throughput": {"enabled": False}}}


def read_ds_config(recipe: Recipe, role: Role) -> dict[str, Any]:
    """The JSON that recipe.deepspeed names for a role, checked. Raises UserError naming the file
    and the key. Of "auto": the first that it may become.
    """
    name: str = getattr(recipe.deepspeed, role)
    name = AUTO_STUDENTS[0] if name == "auto" else name  # until the plan has chosen; alike in bf16
    path = next((p for p in (DS_CONFIGS_DIR / name, Path(name)) if p.is_file()), None)
    if path is None:
        known = ", ".join(sorted(p.name for p in DS_CONFIGS_DIR.glob("*.json")))
        raise UserError(
            f"deepspeed.{role} = {name!r}: no such file; the files in ds_configs/ are {known}"
        )
    config = read_json(path)
    for key, home in RECIPE_KEYS.items():
        if isinstance(config, dict) and key in config:
            raise UserError(
                f"{path}: {key} = {config[key]!r} is set by the recipe ({home}): remove it here"
            )
    check_ds_json(config, path)
    _check_stage(config.get("zero_optimization", {}), role, path)
    checked: dict[str, Any] = config
    return checked


def student_ds_config(recipe: Recipe, world_size: int, device_type: str) -> dict[str, Any]:
    """The student's complete configuration: ZeRO from the JSON; batch, optimizer and clipping from
    the recipe.
    """
    training = recipe.training
    num_micro_batches = recipe.max_micro_batches(world_size)
    config = read_ds_config(recipe, "student")
    parameters: dict[str, Any] = {
        "lr": training.learning_rate,
        "betas": list(training.adam_betas),
        "eps": training.adam_eps,
        "weight_decay": training.weight_decay,
    }
    if config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") == "none":
        # PyTorch's own AdamW: DeepSpeed's would be compiled on first use, on every node. With
        # offload its CPU optimizer is the point, and is built.
        parameters["torch_adam"] = True
        if device_type == "cuda":
            parameters["fused"] = True
    config |= {
        # The loop sets the boundary itself; DeepSpeed wants numbers that multiply.
        "train_batch_size": num_micro_batches * world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": training.max_grad_norm,
        "optimizer": {"type": "AdamW", "params": parameters},
        **QUIET,
    }
    return config


def teacher_ds_config(recipe: Recipe) -> dict[str, Any]:
    """The teacher's complete configuration: no optimizer; DeepSpeed partitions and gathers."""
    return read_ds_config(recipe, "teacher") | {
        "train_micro_batch_size_per_gpu": 1,
        **QUIET,
    }


def is_bf16(config: dict[str, Any]) -> bool:
    return bool(config.get("bf16", {}).get("enabled", False))


def is_zero3(config: dict[str, Any]) -> bool:
    stage: int = config.get("zero_optimization", {}).get("stage", 0)
    return stage == 3


def hpz_size(config: dict[str, Any]) -> int:
    """Ranks that hold a second copy of the weights between them, to gather from in the backward
    pass; 1 is none.
    """
    size: int = config["zero_optimization"].get("zero_hpz_partition_size", 1)
    return size


def check_hpz(recipe: Recipe, ds_config: dict[str, Any], nodes: "Nodes") -> None:
    """Raise UserError unless each of hpZ's groups, consecutive ranks as DeepSpeed divides them,
    stays in one node.
    """
    size = hpz_size(ds_config)
    where = f"deepspeed.student = {recipe.deepspeed.student!r}: zero_hpz_partition_size = {size}"
    if any(len(ranks) % size for ranks in nodes):
        counts = sorted({len(ranks) for ranks in nodes})
        raise UserError(
            f"{where} does not divide the ranks of every node ({' and '.join(map(str, counts))}): "
            "set it to the number of ranks per node or to a divisor of that"
        )
    node_of = {rank: node for node, ranks in enumerate(nodes) for rank in ranks}
    for rank, node in sorted(node_of.items()):
        first = rank - rank % size
        if node_of[first] != node:
            raise UserError(
                f"{where} puts ranks {first} and {rank} into one group, but they are on different "
                "nodes: number the ranks node by node (srun --distribution=block)"
            )


def _check_stage(zero: ZeroSection, role: Role, path: Path) -> None:
    """Raise UserError for a stage that cannot serve the role, and for keys that do not suit it."""
    stage, size = zero.get("stage", 0), zero.get("zero_hpz_partition_size", 1)
    if stage not in STAGES[role]:
        expected = " or ".join(map(str, STAGES[role]))
        raise UserError(
            f"{path}: deepspeed.{role} needs zero_optimization.stage = {expected}, found {stage}"
        )
    if size > 1 and role == "teacher":  # DeepSpeed's one group for it would be the student's too
        raise UserError(
            f"{path}: zero_hpz_partition_size = {size} is only for deepspeed.student: remove it, "
            'and set teacher.shard = "node" to keep the teacher\'s gathers within a node'
        )
    if size > 1 and stage != 3:
        raise UserError(
            f"{path}: zero_hpz_partition_size = {size} needs zero_optimization.stage = 3, found "
            f"{stage}"
        )
    offload = zero.get("offload_param", {})
    if offload.get("device", "none") != "none" and stage != 3:
        raise UserError(
            f"{path}: offload_param.device = {offload['device']!r} needs zero_optimization.stage "
            f"= 3, found {stage}"
        )
    for key, section in (("param", offload), ("optimizer", zero.get("offload_optimizer", {}))):
        if section.get("device") == "nvme" and not section.get("nvme_path"):
            raise UserError(
                f"{path}: offload_{key}.device = 'nvme' needs offload_{key}.nvme_path: write a "
                "folder on a disk of each node"
            )
