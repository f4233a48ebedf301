"""Bytes of one model in its ZeRO engine, on one of the ranks that share it; read from DeepSpeed
0.19's own code.

Weights, gradients and optimizer states are exact to within padding; live_bytes and bucket_bytes are
bounds.
"""

from dataclasses import dataclass
from typing import Any

from kd.engine.ds_config import is_bf16, is_zero3
from kd.plan.shapes import ModelShapes
from kd.plan.trainable import Sizes, Trainable

# DeepSpeed's defaults (runtime/zero/config.py), in elements.
ZERO_DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "sub_group_size": 1_000_000_000,
    "zero_hpz_partition_size": 1,
}


@dataclass(frozen=True)
class ZeroEngine:
    """A model shared by `num_ranks` under the JSON of its engine.

    trainable: of a student; None: nothing is trained, as of a teacher.
    is_plain: it runs without an engine, which costs the host less.
    """

    shapes: ModelShapes
    config: dict[str, Any]
    num_ranks: int
    trainable: Trainable | None
    is_plain: bool = False

    @property
    def is_trained(self) -> bool:
        return self.trainable is not None

    @property
    def trains_head(self) -> bool:
        return self.trainable is not None and self.trainable.trains_head

    @property
    def stage(self) -> int:
        stage: int = self._zero["stage"]
        return stage

    @property
    def width(self) -> int:
        return 2 if is_bf16(self.config) else 4

    @property
    def is_shared(self) -> bool:
        """Whether ranks gather weights from one another."""
        return is_zero3(self.config) and self.num_ranks > 1

    @property
    def num_elements(self) -> int:
        return self.shapes.num_parameters

    @property
    def model_bytes(self) -> int:
        return self.num_elements * self.width

    @property
    def shard_elements(self) -> int:
        """ZeRO-3 divides each parameter and rounds up (Init._partition_numel)."""
        return self._divided(self.shapes.parameter_sizes)

    @property
    def trained_elements(self) -> int:
        return sum(size * count for size, count in self._trained_sizes)

    @property
    def trained_shard_elements(self) -> int:
        return self._divided(self._trained_sizes)

    @property
    def weight_bytes(self) -> int:
        """Between steps: the shard, parameters up to the persistence threshold whole besides it,
        and hpZ's copy.
        """
        if not self.is_shared:
            return self.model_bytes
        elements = self._persistent_elements
        if not self.offloads("param"):
            elements += self.shard_elements
        group = self.value("zero_hpz_partition_size")
        return (elements + (self.num_elements // group if group > 1 else 0)) * self.width

    @property
    def live_bytes(self) -> int:
        """Gathered at most: prefetched or reused, the module at work, a bucket unpacked.

        PartitionedParameterCoordinator.fetch_sub_module prefetches up to max_live_parameters and
        fetches the module itself in any case; __params_to_release keeps what is used again within
        max_reuse_distance.
        """
        if not self.is_shared:
            return 0
        kept = max(
            self.value("stage3_max_live_parameters"), self.value("stage3_max_reuse_distance")
        )
        largest = max(self.layer_elements, *(size for size, _ in self.shapes.parameter_sizes))
        partitioned = self.num_elements - self._persistent_elements
        prefetched = max(self.value("stage3_prefetch_bucket_size"), self.layer_elements)
        bucket = min(prefetched, partitioned)
        return (min(partitioned, kept + largest) + bucket) * self.width

    @property
    def layer_elements(self) -> int:
        """Of a decoder layer, which is gathered at once."""
        heads = 1 if self.shapes.tie_word_embeddings else 2
        return -(-(self.num_elements - heads * self.head_elements) // self.shapes.num_layers)

    @property
    def head_elements(self) -> int:
        return self.shapes.vocab_size * self.shapes.hidden_size

    @property
    def gradient_bytes(self) -> int:
        """Accumulated over micro-batches: sharded (grad_partitions_flat_buffer), but whole under
        stage 1, in bf16 besides what backward itself gives (bf16_optimizer.py).
        """
        if self.offloads("optimizer"):
            return 0
        is_fp32 = self.config.get("data_types", {}).get("grad_accum_dtype") == "fp32"
        width = 4 if is_fp32 else self.width
        if self.stage == 1:
            return self.trained_elements * (width + (self.width if is_bf16(self.config) else 0))
        return self.trained_shard_elements * width

    @property
    def optimizer_bytes(self) -> int:
        """Master weights and both moments of Adam, in fp32, sharded."""
        return 0 if self.offloads("optimizer") else 12 * self.trained_shard_elements

    @property
    def bucket_bytes(self) -> int:
        """The buffer of gradients to reduce (two for stage 2 with overlap_comm), and a copy while
        it is reduced.
        """
        bucket = self.value("reduce_bucket_size")
        num_buffers = 2 if not is_zero3(self.config) and self._zero.get("overlap_comm") else 1
        return (num_buffers * bucket + min(bucket, self.trained_elements)) * self.width

    @property
    def step_bytes(self) -> int:
        """Gradients once more, flat, by sub-group (_prepare_fp32_grad_for_sub_group)."""
        if self.offloads("optimizer"):
            return 0
        return 4 * min(self.trained_shard_elements, self.value("sub_group_size"))

    @property
    def checkpoint_bytes(self) -> int:
        """Of all ranks: optimizer states, and below stage 3 the weights besides them, of which
        DeepSpeed leaves out the frozen ones, but knows a tied one by one of its names only.
        """
        weights = 0
        if not is_zero3(self.config):
            is_kept = self.shapes.tie_word_embeddings and not self.trains_head
            weights = self.trained_elements + (self.head_elements if is_kept else 0)
        return 12 * self.trained_shard_elements * self.num_ranks + weights * self.width

    @property
    def host_bytes(self) -> int:
        """Offloaded, in fp32: master weights, moments, and gradients twice (stage3.py)."""
        parameters = self.width * self.shard_elements if self.offloads("param") else 0
        return parameters + (20 * self.trained_shard_elements if self.offloads("optimizer") else 0)

    @property
    def received_per_forward(self) -> float:
        """Bytes that a rank receives in the forward pass of a micro-batch: weights, under stage
        3.
        """
        return self._of_others(self.num_elements) if self.stage == 3 else 0.0

    @property
    def received_per_micro_batch(self) -> float:
        """Bytes that a rank receives while it computes: under stage 3 weights in forward, and in
        backward again; from stage 2 on gradients, which are reduced.
        """
        reduced = self._of_others(self.trained_elements) if self.stage > 1 else 0.0
        return (2 if self.is_trained else 1) * self.received_per_forward + reduced

    @property
    def received_per_step(self) -> float:
        """Bytes that a rank receives after its micro-batches: below stage 3 the new weights, and
        under stage 1 all gradients, which are reduced and sent to all.
        """
        return {1: 3, 2: 1, 3: 0}[self.stage] * self._of_others(self.trained_elements)

    def _of_others(self, num_elements: int) -> float:
        """Bytes of weights, or gradients: the part of other ranks."""
        return num_elements * self.width * (self.num_ranks - 1) / self.num_ranks

    def _divided(self, sizes: Sizes) -> int:
        return sum(-(-size // self.num_ranks) * count for size, count in sizes)

    @property
    def _trained_sizes(self) -> Sizes:
        return self.trainable.sizes if self.trainable else ()

    def offloads(self, what: str) -> bool:
        device: str = (self._zero.get(f"offload_{what}") or {}).get("device", "none")
        return device != "none"

    def value(self, key: str) -> int:
        return int(self._zero.get(key, ZERO_DEFAULTS[key]))

    @property
    def _persistent_elements(self) -> int:
        threshold = self.value("stage3_param_persistence_threshold")
        return sum(size * count for size, count in self.shapes.parameter_sizes if size <= threshold)

    @property
    def _zero(self) -> dict[str, Any]:
        section: dict[str, Any] = self.config["zero_optimization"]
        return section
