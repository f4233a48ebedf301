"""Every bad argument is a ValueError or a TypeError that names it and says what to do."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from kd.losses import Objective, distillation_loss, sparse_distillation_loss

NAN, INF = float("nan"), float("inf")
INDEX = torch.tensor([1, 2, 4])


def int32(tensor):
    return tensor.to(torch.int32)


def weights(p, value):
    """Weights of 1, but for a supervised row."""
    return torch.ones(p.labels.shape).index_fill(0, (p.labels >= 0).nonzero()[0], value)


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
    "temperature 1e-300": (lambda p: {"temperature": 1e-300}, "temperature=1e-300.*1.0"),
    "temperature 1e300": (lambda p: {"temperature": 1e300}, "temperature=1e[+]300.*1.0"),
    "temperature below 0": (lambda p: {"temperature": -1}, "temperature=-1.*positive"),
    "beta nan": (lambda p: {"divergence": "jsd", "beta": NAN}, "beta=nan"),
    "kd_weight 10^400": (lambda p: {"kd_weight": 10**400}, "kd_weight=1000.*finite"),
    "ignore_index 10^23": (lambda p: {"ignore_index": 10**23}, "ignore_index=1000.*64 bits"),
    "kd_weight nan": (lambda p: {"kd_weight": NAN}, "kd_weight=nan"),
    "backend of another type": (lambda p: {"backend": 3}, "backend=3.*torch, triton"),
    "reduction None": (lambda p: {"reduction": None}, "reduction=None.*'mean'|'sum'"),
    "chunk_size below 0": (lambda p: {"chunk_size": -4}, "chunk_size=-4"),
    "logits_gib 0": (lambda p: {"logits_gib": 0}, "logits_gib=0 must be positive"),
    "softcap nan": (lambda p: {"teacher_softcap": NAN}, "teacher_softcap=nan"),
    "softcap 1e-300": (lambda p: {"student_softcap": 1e-300}, "student_softcap=1e-300.*float32"),
    "scale infinite": (lambda p: {"student_scale": INF}, "student_scale=inf"),
    "dtype of numpy": (lambda p: {"logits_dtype": np.float32}, "logits_dtype.*float32"),
    "sparse layout": (
        lambda p: {"student_hidden": p.student_hidden.to_sparse()},
        r"student_hidden has the layout torch.sparse_coo.*student_hidden.to_dense\(\)",
    ),
    "compressed head": (
        lambda p: {"teacher_head": p.teacher_head.float().to_mkldnn()},
        "teacher_head has the layout torch._mkldnn",
    ),
    "sparse labels": (lambda p: {"labels": p.labels.to_sparse()}, "labels has the layout"),
    "hidden size 0": (
        lambda p: {"student_hidden": p.student_hidden[:, :0], "student_head": torch.empty(31, 0)},
        r"student_hidden is \(13, 0\).*at least 1",
    ),
    "hidden states of no dimension": (
        lambda p: {"labels": torch.tensor(1), "student_hidden": torch.tensor(1.0)},
        r"student_hidden is \(\)",
    ),
    "no tokens": (
        lambda p: {"student_head": p.student_head[:0]},
        r"student_head is \(0, 6\).*row per token",
    ),
    "hidden states in int64": (
        lambda p: {
            "student_hidden": p.student_hidden.long(),
            "student_head": p.student_head.long(),
        },
        "student_hidden torch.int64.*bfloat16",
    ),
    "complex hidden states": (
        lambda p: {"teacher_hidden": p.teacher_hidden.to(torch.complex64)},
        "teacher_hidden torch.complex64",
    ),
    "labels as floats": (lambda p: {"labels": p.labels.double()}, "labels are torch.float64"),
    "negative label": (lambda p: {"labels": p.labels.clamp_min(0) - 1}, r"labels.*-1.*\[0, 31\)"),
    "index too large": (lambda p: {"row_index": INDEX + 12}, r"row_index.*\[0, 13\)"),
    "index below 0": (lambda p: {"row_index": INDEX - 2}, r"row_index.*\[0, 13\).*negative"),
    "index twice": (lambda p: {"row_index": torch.tensor([2, 1, 2])}, "row_index.*twice"),
    "index as floats": (lambda p: {"row_index": INDEX.float()}, "row_index is torch.float32"),
    "weight below 0": (
        lambda p: {"token_weights": weights(p, -0.5)},
        "token_weights.*at least 0",
    ),
    "weight nan": (lambda p: {"token_weights": weights(p, NAN)}, "token_weights.*finite"),
    "weight infinite": (
        lambda p: {"token_weights": weights(p, INF), "reduction": "mean"},
        "token_weights.*finite",
    ),
    "complex weights": (
        lambda p: {"token_weights": weights(p, 1).to(torch.complex64)},
        "token_weights is torch.complex64",
    ),
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


# values of another type, by argument
OTHER_TYPES = {
    "temperature": ["2", True, Fraction(2), None, torch.tensor(2.0), 1j, np.ones(1)],
    "kd_weight": ["0.5", False, None],
    "ce_weight": [True, [0.5]],
    "beta": ["0.5", True, None],
    "chunk_size": ["4", 4.0, True, torch.tensor(4)],
    "logits_gib": ["2", True, None],
    "vocab_size": ["31", 31.0, True],
    "ignore_index": ["-100", -100.0, None],
    "student_softcap": ["30", True],
    "teacher_scale": ["1", None],
    "student_hidden": [np.zeros((13, 6)), None, [[0.0]]],
    "teacher_hidden": [np.zeros((13, 9)), "x"],
    "student_head": [np.zeros((31, 6)), None],
    "labels": [np.zeros(13, dtype=np.int64), [1] * 13, None],
    "token_weights": [np.ones(13), 1.0],
    "row_index": [np.arange(3), [0, 1], slice(3)],
    "student_bias": [np.zeros(31), 0.0],
}


@pytest.mark.parametrize("name", OTHER_TYPES)
def test_an_argument_of_another_type_is_named(make_problem, name):
    p = make_problem()
    names = ("student_hidden", "student_head", "teacher_hidden", "teacher_head", "labels")
    arguments = {name: getattr(p, name) for name in names} | {"divergence": "jsd"}
    for value in OTHER_TYPES[name]:
        with pytest.raises(TypeError, match=f"^{name}[= ].*pass a"):
            distillation_loss(**arguments | {name: value})


def test_numbers_of_other_real_types_are_numbers(make_problem):
    p = make_problem()
    tensors = (p.student_hidden, p.student_head, p.teacher_hidden, p.teacher_head, p.labels)
    plain = distillation_loss(*tensors, temperature=2.0, chunk_size=4)
    other = distillation_loss(*tensors, temperature=np.float32(2), chunk_size=np.int64(4))
    assert torch.equal(plain.loss, other.loss)


@pytest.mark.parametrize("temperature", [1e-18, 1e18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_is_finite_at_both_ends_of_the_temperature(make_problem, temperature, dtype):
    p = make_problem(dtype=dtype)
    hidden = p.student_hidden.requires_grad_()
    tensors = (hidden, p.student_head, p.teacher_hidden, p.teacher_head, p.labels)
    loss = distillation_loss(*tensors, temperature=temperature).loss
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad.isfinite().all()


def test_weights_of_rows_that_are_not_supervised_are_not_looked_at(make_problem):
    p = make_problem()
    tensors = (p.student_hidden, p.student_head, p.teacher_hidden, p.teacher_head, p.labels)
    token_weights = torch.ones(13).masked_fill(p.labels == -100, NAN)
    weighted = distillation_loss(*tensors, token_weights=token_weights)
    assert torch.equal(weighted.loss, distillation_loss(*tensors).loss)


# changed arguments of the sparse loss -> the error, and what its message must say
BAD_TOP_K = {
    "ids too large": (
        lambda k: {"teacher_ids": k["ids"] + 31},
        ValueError,
        r"teacher_ids.*\[0, 31",
    ),
    "ids below 0": (lambda k: {"teacher_ids": k["ids"] - 31}, ValueError, "teacher_ids"),
    "ids as floats": (lambda k: {"teacher_ids": k["ids"].float()}, ValueError, "teacher_ids is"),
    "ids of numpy": (
        lambda k: {"teacher_ids": k["ids"].numpy()},
        TypeError,
        "teacher_ids is a num",
    ),
    "no ids": (lambda k: {"teacher_ids": None}, TypeError, "teacher_ids is a builtins.NoneType"),
    "sparse logprobs": (
        lambda k: {"teacher_logprobs": k["logprobs"].to_sparse()},
        ValueError,
        "teacher_logprobs has the layout",
    ),
    "logprobs above 0": (
        lambda k: {"teacher_logprobs": k["logprobs"] + 9},
        ValueError,
        "teacher_logprobs.*at most 0",
    ),
    "logprobs nan": (
        lambda k: {"teacher_logprobs": k["logprobs"] * NAN},
        ValueError,
        "teacher_logprobs.*NaN",
    ),
    "logits for logprobs": (
        lambda k: {"teacher_logprobs": k["logprobs"] * 0 - 0.1},
        ValueError,
        "teacher_logprobs.*more than 1.*log_softmax",
    ),
    "nothing left": (
        lambda k: {"teacher_logprobs": k["logprobs"] - INF, "tail": "ignore"},
        ValueError,
        "teacher_logprobs.*tail='ignore'",
    ),
    "tail of another type": (lambda k: {"tail": 0}, ValueError, "tail=0.*bucket, ignore"),
    "temperature": (lambda k: {"temperature": True}, TypeError, "temperature=True"),
    "chunk_size": (lambda k: {"chunk_size": 1.5}, TypeError, "chunk_size=1.5"),
    "logits_gib": (lambda k: {"logits_gib": 0.0}, ValueError, "logits_gib=0.0.*default is 2.0"),
    "row_index": (lambda k: {"row_index": INDEX + 12}, ValueError, "row_index"),
    "token_weights": (lambda k: {"token_weights": -torch.ones(13)}, ValueError, "token_weights"),
}


@pytest.mark.parametrize("case", BAD_TOP_K)
def test_a_bad_argument_of_the_sparse_loss_is_named(make_problem, case):
    p = make_problem()
    logits_NV = p.teacher_hidden @ p.teacher_head.T
    logprobs, ids = logits_NV.log_softmax(-1).topk(4)
    change, error, message = BAD_TOP_K[case]
    arguments = {
        "student_hidden": p.student_hidden,
        "student_head": p.student_head,
        "teacher_ids": ids,
        "teacher_logprobs": logprobs,
        "labels": p.labels,
    }
    sparse_distillation_loss(**arguments)
    with pytest.raises(error, match=message):
        sparse_distillation_loss(**arguments | change({"ids": ids, "logprobs": logprobs}))


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
