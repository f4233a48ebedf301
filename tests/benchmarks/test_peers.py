"""Every peer computes what our reference computes: only then do their times compare."""

import pytest
import torch
from measure import forward_backward, reference, reference_kl, relative_error
from peers import BETA, PEERS, Shape, make_problem

pytestmark = pytest.mark.benchmark

# Two chunks of Liger's 1024 rows, of unequal hidden sizes.
SHAPE, NUM_TOKENS = Shape(12, 20, 300), 2100
ON_CPU = [name for name, peer in PEERS.items() if "cpu" in peer.devices]
ON_GPU = [name for name, peer in PEERS.items() if "cuda" in peer.devices]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def no_compiler():
    """torch.compile's wrappers run, its compiler does not: it takes longer than all of these
    tests.
    """
    before = torch.compiler.set_stance("force_eager")
    yield before
    torch.compiler.set_stance("default")


def outcome(name, divergence, device, dtype, **options):
    """A peer's loss and gradients on a problem, and those of the reference."""
    peer = PEERS[name]
    if peer.package:
        pytest.importorskip(peer.package)
    problem = make_problem(
        SHAPE, NUM_TOKENS, divergence, dtype=dtype, device=torch.device(device), **options
    )
    value = forward_backward(peer.loss, problem)
    return (value, problem.student_hidden_NH.grad, problem.student_head_VH.grad), reference(problem)


@pytest.mark.parametrize("is_matched", [False, True])
@pytest.mark.parametrize("divergence", BETA)
@pytest.mark.parametrize("name", ON_CPU)
def test_a_peer_has_the_value_and_gradients_of_the_reference(
    no_compiler, name, divergence, is_matched
):
    measured, expected = outcome(name, divergence, "cpu", torch.float32, is_matched=is_matched)
    assert expected[0] > 0.005 * NUM_TOKENS
    for got, want in zip(measured, expected, strict=True):
        assert relative_error(got, want) < 1e-4


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("divergence", BETA)
@pytest.mark.parametrize("name", ON_GPU)
def test_on_a_gpu_a_peer_errs_by_no_more_than_bfloat16(name, divergence):
    measured, expected = outcome(name, divergence, "cuda", torch.bfloat16)
    assert relative_error(measured[0], expected[0]) < 0.01
    for got, want in zip(measured[1:], expected[1:], strict=True):
        assert relative_error(got, want) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matched_pair_nearly_agrees_and_a_random_pair_does_not(dtype):
    def kl(is_matched):
        shape = Shape(96, 160, 4000)
        device = torch.device("cpu")
        return reference_kl(
            make_problem(shape, 64, "jsd", dtype=dtype, device=device, is_matched=is_matched)
        )

    assert 0.03 < kl(True) < 0.07
    assert kl(False) > 3
