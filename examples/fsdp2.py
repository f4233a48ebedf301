"""The distillation loss under FSDP2: `torchrun --nproc_per_node 2 examples/fsdp2.py`.

FSDP2 makes the weights of a unit whole while the forward of its module runs, and the loss needs the
whole weights of both heads. So the loss is computed in the forward of a module that owns them.
"""

import os

import torch
import torch.distributed as dist
from tiny_pair import collate, draw_texts, load_pair
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from kd import distillation_loss

NUM_STEPS, BATCH_SIZE = 8, 8  # of each rank


class HeadLoss(nn.Module):
    """Both heads, and as their forward the loss, summed over the labels that are not -100."""

    def __init__(self, student_head: nn.Linear, teacher_head: nn.Linear) -> None:
        super().__init__()
        self.student_head, self.teacher_head = student_head, teacher_head

    def forward(self, student_hidden: Tensor, teacher_hidden: Tensor, labels: Tensor) -> Tensor:
        # A head that has a bias, a softcap or a scale needs it here as well:
        # kd.models.head.head_of(model) knows them.
        return distillation_loss(
            student_hidden,
            self.student_head.weight,
            teacher_hidden,
            self.teacher_head.weight,
            labels,
        ).loss


class Distillation(nn.Module):
    """Both models without their heads, and the loss: what FSDP2 shards."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        super().__init__()
        self.student, self.teacher = student.model, teacher.model
        self.head_loss = HeadLoss(student.lm_head, teacher.lm_head)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        with torch.no_grad():
            teacher_hidden = self.teacher(**inputs).last_hidden_state
        student_hidden = self.student(**inputs).last_hidden_state
        return self.head_loss(student_hidden[:, :-1], teacher_hidden[:, :-1], labels[:, 1:])


def shard(model: Distillation, mesh: DeviceMesh) -> None:
    """Make units of each layer, of the heads, and of the rest."""
    for layer in (*model.student.layers, *model.teacher.layers):
        fully_shard(layer, mesh=mesh)
    heads = model.head_loss
    is_tied = (
        heads.student_head.weight is model.student.embed_tokens.weight
        or heads.teacher_head.weight is model.teacher.embed_tokens.weight
    )
    # A weight belongs to one unit. A tied head is also the embedding, so both stay in the rest,
    # which is whole from the embedding to the loss.
    if not is_tied:
        fully_shard(heads, mesh=mesh)
    fully_shard(model, mesh=mesh)


def rank_loss(model: Distillation, batch: dict[str, Tensor]) -> Tensor:
    """Whose gradients, which FSDP2 averages over ranks, are those of the mean over all labels.

    Collective: every rank must call this.
    """
    num_tokens = (batch["labels"][:, 1:] != -100).sum()
    dist.all_reduce(num_tokens)
    # The average over R ranks of R * sum_r / num_tokens is the sum of all sum_r / num_tokens.
    return model(**batch) * dist.get_world_size() / num_tokens


def main() -> None:
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    # It also starts the process group, with NCCL or gloo
    mesh = init_device_mesh(device_type, (int(os.environ["WORLD_SIZE"]),))
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    student, teacher, tokenizer = load_pair()
    model = Distillation(student.train(), teacher).to(device_type)
    shard(model, mesh)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=4e-4)  # after shard(): of the parts
    texts = draw_texts(NUM_STEPS * BATCH_SIZE * num_ranks)[rank::num_ranks]
    for step in range(NUM_STEPS):
        batch = collate(tokenizer, texts[step * BATCH_SIZE : (step + 1) * BATCH_SIZE])
        loss = rank_loss(model, {name: ids.to(device_type) for name, ids in batch.items()})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / num_ranks
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step + 1}: loss {mean.item():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
