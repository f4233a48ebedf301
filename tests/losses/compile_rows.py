"""Compiles the row kernel for a GPU that is not there, by the loss itself, and prints what came of
it as JSON.

Triton's own launcher runs, up to the launch: its specialisation and its cache are those of a GPU's.
A script, for in the process of the other tests Triton interprets.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

import kd.losses.chunked
import kd.losses.heads
from kd.losses import DIVERGENCES, Head, Objective
from kd.losses.chunk_plan import ChunkPlan
from kd.losses.chunked import chunked_loss
from kd.losses.divergences import DIVERGENCE_TABLE
from kd.losses.inputs import supervised_inputs
from kd.losses.triton_kernel import row_kernel
from kd.losses.triton_rows import triton_rows

VOCAB_SIZE, DEVICE = 151936, 0  # of Qwen2.5; registers differ a little with it
PLAN = ChunkPlan(64, 8)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_for(capability):
    """Make Triton believe in a GPU of this compute capability, and stop before every launch."""
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: DEVICE,
        get_current_stream=lambda _: 0,
    )
    triton.runtime.driver.set_active(driver)
    row_kernel.device_caches.clear()
    launch = type(row_kernel).run
    row_kernel.run = lambda *args, **options: launch(
        row_kernel, *args, **options | {"warmup": True}
    )
    # bf16 operands and fp32 products, as on CUDA, without the products, for which the CPU has no
    # kernel
    kd.losses.heads.operand = lambda tensor, _: tensor
    kd.losses.chunked.product = _no_product
    kd.losses.chunked.addmm_ = lambda *_, is_first: None


def _no_product(a, b, *, dtype=None, out=None):
    return torch.zeros(a.shape[0], b.shape[1], dtype=dtype) if out is None else out


def compiled():
    """The kernels in Triton's cache."""
    return list(row_kernel.device_caches[DEVICE][0].values())


def run(num_rows, objective=None, plan=PLAN, *, softcap=None, diagnostics=True):
    """The chunk loop on the CPU, with whatever a kernel that never ran leaves."""
    dtype = torch.bfloat16
    weights = (
        torch.zeros(VOCAB_SIZE, 4, dtype=dtype).requires_grad_(),
        torch.zeros(VOCAB_SIZE, 6, dtype=dtype),
    )
    bias = None if softcap is None else torch.zeros(VOCAB_SIZE, dtype=dtype)
    inputs = supervised_inputs(
        torch.zeros(num_rows, 4, dtype=dtype),
        Head(weights[0], bias, softcap, 1.0 if softcap is None else 0.5),
        torch.zeros(num_rows, 6, dtype=dtype),
        Head(weights[1], None, None, 1.0),
        torch.zeros(num_rows, dtype=torch.int64),
        objective or Objective(),
        token_weights=None,
        row_index=torch.arange(num_rows),
        ignore_index=-100,
        reduction="sum",
        vocab_size=None,
        logits_dtype=None,
    )
    chunked_loss(inputs, plan, triton_rows, with_diagnostics=diagnostics)


def resources(kernel):
    """Registers, bytes of stack and of local memory (spilled registers) of a thread, as NVIDIA's
    tool reads them.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.check_output([CUOBJDUMP, "-res-usage", file.name], text=True)
    (line,) = (line for line in text.splitlines() if "REG:" in line)
    return {
        key: int(value)
        for key, value in (part.split(":") for part in line.split() if part.count(":") == 1)
    }


def exponentials(kernel):
    """Which instructions take powers of two."""
    return sorted(set(re.findall(r"ex2\.[.\w]+", kernel.asm["ptx"])))


def refusal_of_an_unknown(is_mixture):
    """What the compiler says of a divergence that stands in the table alone."""
    DIVERGENCE_TABLE["unheard_of"] = DIVERGENCE_TABLE["tvd"]._replace(is_mixture=is_mixture)
    try:
        run(9, Objective("unheard_of"))
    except triton.compiler.CompilationError as error:
        while error.__cause__ is not None:
            error = error.__cause__
        return str(error)
    finally:
        del DIVERGENCE_TABLE["unheard_of"]
    return ""


def main():
    compile_for(90)
    counts = []
    for num_rows in (5, 1, 8, 63, 64, 65, 513):
        run(num_rows)
        run(num_rows, plan=ChunkPlan(5, 3))
        counts.append(len(compiled()))
    kernels, powers = {}, {}
    for capability in (80, 90):
        compile_for(capability)
        for divergence in DIVERGENCES:
            run(9, Objective(divergence))
            kernels[f"sm_{capability} {divergence}"] = resources(compiled()[-1])
            powers[f"sm_{capability} {divergence}"] = exponentials(compiled()[-1])
    run(9, Objective(temperature=2.0))
    kernels["sm_90 tempered"] = resources(compiled()[-1])
    run(9, Objective("mixed_kl", temperature=2.0), softcap=30.0)
    kernels["sm_90 everything at once"] = resources(compiled()[-1])
    run(9, Objective(kd_weight=0.0), diagnostics=False)
    kernels["sm_90 cross-entropy"] = resources(compiled()[-1])
    refusals = [refusal_of_an_unknown(is_mixture) for is_mixture in (False, True)]
    report = {"counts": counts, "kernels": kernels, "powers": powers, "refusals": refusals}
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") != "1"
    main()
