"""One rank: FLOPs of optimizer steps as torch counts them, and as kd.plan says, with real engines
on real batches.

flops_worker.py RECIPE OUTPUT

writes OUTPUT, [{"counted": [...], "planned": [...]}], a list for each of SETTINGS
"""

import json
import sys
from pathlib import Path

from torch.utils.flop_counter import FlopCounterMode

from kd.data.dataset import load_data
from kd.data.loader import Loader
from kd.data.tokenizers import load_tokenizers
from kd.distributed.process_group import init_distributed
from kd.engine.ds_config import student_ds_config
from kd.plan.cost import pair_of
from kd.plan.lengths import batch_shape, step_lengths
from kd.recipe import Recipe, load_recipe
from kd.training.build import build_live_teacher, build_student
from kd.training.step import train_step

# (truncation.keep_fraction, student.gradient_checkpointing, what else is set)
LORA, HEAD = "student.lora.rank=8", "student.freeze_head=true"
SETTINGS = [(0.5, False, ()), (1.0, False, ()), (0.5, True, ()), (1.0, True, ())]
SETTINGS += [(0.5, False, (LORA,)), (1.0, True, (LORA,)), (0.5, False, (HEAD,))]
NUM_STEPS = 2


def main() -> None:
    init_distributed()
    results = []
    for keep_fraction, checkpointing, more in SETTINGS:
        overrides = [
            f"truncation.keep_fraction={keep_fraction}",
            f"student.gradient_checkpointing={checkpointing}",
        ]
        attention = ["teacher.attention=eager", "student.attention=eager"]
        results.append(
            measure(
                load_recipe(sys.argv[1], [*(text.lower() for text in overrides + attention), *more])
            )
        )
    Path(sys.argv[2]).write_text(json.dumps(results))


def measure(recipe: Recipe) -> dict[str, list[float]]:
    layout = init_distributed()
    tokenizer = load_tokenizers(recipe)
    examples = load_data(recipe, tokenizer).train
    loader = Loader(examples, batch_shape(recipe), 0, tokenizer.pad_token_id)
    teacher = build_live_teacher(recipe, layout)
    student = build_student(recipe, student_ds_config(recipe, 1, layout.device.type), layout)
    pair, result = pair_of(recipe), {"counted": [], "planned": []}
    for step in range(NUM_STEPS):
        with FlopCounterMode(display=False) as counter:
            train_step(student, teacher, loader.micro_batches(step, layout), 1e-3, layout)
        lengths = step_lengths(loader, step, 1)
        flops = pair.step_flops(lengths.padded_N, lengths.supervised_N, 1)
        result["counted"].append(counter.get_total_flops())
        result["planned"].append(flops.model + flops.recomputed)
    return result


if __name__ == "__main__":
    main()
