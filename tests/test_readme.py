"""README's Python block runs as it is printed."""

import re

import torch
from tiny import ROOT, tiny_config
from transformers import Qwen2ForCausalLM, Qwen3ForCausalLM


def test_the_python_block_computes_a_loss_that_reaches_the_student_only():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    torch.manual_seed(0)
    student = Qwen3ForCausalLM(tiny_config())
    teacher = Qwen2ForCausalLM(tiny_config("qwen2", hidden_size=48))
    labels = torch.randint(0, 160, (2, 9))
    input_ids = labels.clone()
    labels[:, :4] = -100
    names = {"torch": torch, "student": student, "teacher": teacher}
    names |= {"input_ids": input_ids, "labels": labels}
    exec(blocks[0], names)
    loss = names["loss"]
    assert loss.isfinite()
    assert loss > 0.5
    loss.backward()
    assert student.lm_head.weight.grad.norm() > 1e-3
    assert all(parameter.grad is None for parameter in teacher.parameters())
