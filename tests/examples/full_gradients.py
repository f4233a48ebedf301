"""What the examples are compared with: one process, full logits and plain autograd."""

import torch
from tiny import tiny_config
from tiny_pair import FOLDER, collate
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

Gradients = dict[str, Tensor]
# Of unequal lengths: however they are dealt to ranks and micro-batches, these do not have equally
# many labels, and a mean of means is another number.
TEXTS = ["1+2=3;" * repeats for repeats in (1, 2, 4, 8)]


def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER / "teacher")


def random_pair(
    *, student_tied: bool, teacher_tied: bool = False
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Student and teacher, of another architecture, size and vocabulary; the same each time."""
    torch.manual_seed(0)
    student = Qwen3ForCausalLM(tiny_config(tie_word_embeddings=student_tied))
    sizes = {"hidden_size": 48, "vocab_size": 170, "tie_word_embeddings": teacher_tied}
    teacher = Qwen2ForCausalLM(tiny_config("qwen2", **sizes))
    return student, teacher.eval().requires_grad_(False)


def full_gradients(student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[float, Gradients]:
    """Of half the forward KL and half the cross-entropy, a mean over the labels of all TEXTS."""
    batch = collate(tokenizer(), TEXTS)
    labels_BL = batch.pop("labels")[:, 1:]
    is_supervised_BL = labels_BL != -100
    labels_N1 = labels_BL[is_supervised_BL][:, None]
    log_q_NV, log_p_NV = (
        model(**batch).logits[:, :-1][is_supervised_BL][:, :160].log_softmax(-1)
        for model in (student, teacher)
    )
    kl_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
    ce_N = -log_q_NV.gather(1, labels_N1).squeeze(1)
    loss = (0.5 * kl_N + 0.5 * ce_N).mean()
    names, parameters = zip(*student.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return loss.item(), dict(zip(names, gradients, strict=True))


def largest_error(actual: Gradients, expected: Gradients) -> float:
    """Of any parameter, relative to the norm of its expected gradient."""
    assert actual.keys() == expected.keys()
    assert all(gradient.norm() > 1e-3 for gradient in expected.values()), "nothing to compare"
    errors = (actual[name] - expected[name] for name in expected)
    norms = (gradient.norm() for gradient in expected.values())
    return max(float(e.norm() / norm) for e, norm in zip(errors, norms, strict=True))
