"""Every bad argument is a ValueError that names it and says what to do."""

import pytest
import torch

from kd.losses import Objective, distillation_loss


def int32(tensor):
    return tensor.to(torch.int32)


# changed arguments, given the good problem -> what the message must say
BAD = {
    "misspelt divergence": (
        lambda p: {"divergence": "foward_kl"},
        "divergence='foward_kl'.*'forward_kl'",
    ),
    "jsd at 0": (lambda p: {"divergence": "jsd", "beta": 0.0}, "beta=0.0.*forward_kl.*reverse_kl"),
    "jsd at 1": (lambda p: {"divergence": "jsd", "beta": 1.0}, "beta=1.0.*forward_kl.*reverse_kl"),
    "skew at 0": (lambda p: {"divergence": "skew_kl", "alpha": 0.0}, "alpha=0.0.*'forward_kl'"),
    "skew above 1": (
        lambda p: {"divergence": "skew_reverse_kl", "alpha": 1.5},
        "alpha=1.5.*'reverse_kl'",
    ),
    "mix above 1": (
        lambda p: {"divergence": "mixed_kl", "mix_weight": 1.1},
        "mix_weight=1.1.*forward_kl",
    ),
    "temperature 0": (lambda p: {"temperature": 0.0}, "temperature=0.0.*positive"),
    "temperature nan": (lambda p: {"temperature": float("nan")}, "temperature=nan"),
    "negative kd_weight": (lambda p: {"kd_weight": -1.0}, "kd_weight=-1.0.*not negative"),
    "infinite ce_weight": (lambda p: {"ce_weight": float("inf")}, "ce_weight=inf.*finite"),
    "unknown backend": (lambda p: {"backend": "tritn"}, "backend='tritn'.*'triton'"),
    "unknown reduction": (lambda p: {"reduction": "none"}, "reduction='none'.*'mean'|'sum'"),
    "chunk_size 0": (lambda p: {"chunk_size": 0}, "chunk_size=0.*at least 1"),
    "vocab_size 0": (lambda p: {"vocab_size": 0}, "vocab_size=0.*at least 1"),
    "logits in float16": (
        lambda p: {"logits_dtype": torch.float16},
        "logits_dtype=torch.float16.*bfloat16",
    ),
    "softcap 0": (lambda p: {"student_softcap": 0.0}, "student_softcap=0.0.*None"),
    "scale 0": (lambda p: {"teacher_scale": 0.0}, "teacher_scale=0.0.*1.0"),
    "no teacher": (
        lambda p: {"teacher_hidden": None, "teacher_head": None},
        "teacher_hidden=None.*kd_weight=0",
    ),
    "half a teacher": (
        lambda p: {"teacher_head": None, "kd_weight": 0.0},
        "teacher_head=None.*no teacher",
    ),
    "labels too short": (
        lambda p: {"labels": p.labels[:-1]},
        r"student_hidden.*\(13, 6\).*labels \(12,\)",
    ),
    "teacher rows": (
        lambda p: {"teacher_hidden": p.teacher_hidden[:-1]},
        r"teacher_hidden is \(12, 9\)",
    ),
    "labels in int32": (lambda p: {"labels": int32(p.labels)}, "labels are torch.int32.*int64"),
    "head of the other": (
        lambda p: {"student_head": p.teacher_head},
        r"student_head is \(31, 9\).*\(13, 6\)",
    ),
    "sharded head": (
        lambda p: {"student_head": torch.empty(0)},
        r"student_head is \(0,\).*gathered",
    ),
    "dtypes": (
        lambda p: {"student_head": p.student_head.float()},
        "student_head is torch.float32.*float64",
    ),
    "bias shape": (lambda p: {"student_bias": torch.zeros(30)}, r"student_bias.*\(30,\).*\(31,\)"),
    "bias dtype": (
        lambda p: {"teacher_bias": p.teacher_bias.float()},
        "teacher_bias is torch.float32",
    ),
    "token weights": (
        lambda p: {"token_weights": torch.ones(12)},
        r"token_weights is \(12,\).*\(13,\)",
    ),
    "index in int32": (
        lambda p: {"row_index": int32(torch.arange(3))},
        "row_index is torch.int32.*int64",
    ),
    "index in 2-D": (
        lambda p: {"row_index": torch.zeros(3, 1, dtype=torch.int64)},
        r"row_index.*\(3, 1\)",
    ),
    "label too large": (lambda p: {"labels": p.labels + 31}, r"labels.*\[0, 31\).*ignore_index"),
    "index of an ignored row": (
        lambda p: {"row_index": torch.arange(13)},
        r"labels.*-100.*row_index",
    ),
    "another device": (
        lambda p: {"row_index": torch.arange(3, device="meta")},
        "row_index is on meta.*cpu",
    ),
    "head elsewhere": (
        lambda p: {"student_head": p.student_head.to("meta")},
        "student_head is on meta.*cpu",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_argument_is_named_with_value_and_remedy(make_problem, case):
    problem = make_problem()
    change, message = BAD[case]
    names = ("student_hidden", "student_head", "teacher_hidden", "teacher_head", "labels")
    arguments = {name: getattr(problem, name) for name in names}
    distillation_loss(**arguments)
    with pytest.raises(ValueError, match=message):
        distillation_loss(**arguments | change(problem))


def test_parameters_of_other_divergences_are_not_looked_at():
    assert Objective("forward_kl", beta=1.0, alpha=0.0, mix_weight=9.0).parameter == 0.0
    assert Objective("jsd", beta=0.3, alpha=0.0).parameter == 0.3


def test_triton_on_a_cpu_is_an_error_unless_it_is_interpreted(make_problem, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    p = make_problem()
    with pytest.raises(ValueError, match="backend='triton' runs on CUDA.*on cpu.*'torch'"):
        distillation_loss(
            p.student_hidden,
            p.student_head,
            p.teacher_hidden,
            p.teacher_head,
            p.labels,
            backend="triton",
        )
