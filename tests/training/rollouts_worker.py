"""Run by the launcher on every rank: a step that learns from sampled responses, wherever teacher
and student live, against one process that samples, and learns, one sequence at a time.

rollouts_worker.py RECIPE FOLDER OUTPUT

writes {case: {"loss": [loss, reference], "gradient": relative error, "responses": [found,
expected], "figures": {...}}}
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from full_logits import full_loss
from layouts_worker import capture_gradients, relative_error, set_trained
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from kd.data.collate import collate
from kd.data.dataset import Examples, load_data
from kd.data.loader import Loader
from kd.data.tokenizers import load_tokenizers
from kd.distributed.layout import Layout
from kd.distributed.process_group import init_distributed
from kd.engine.ds_config import student_ds_config
from kd.generation.sampling import Sampling
from kd.generation.tokens import generate_tokens
from kd.plan.lengths import batch_shape
from kd.recipe import Recipe, load_recipe
from kd.rollouts.sampled import as_example, sampled_response
from kd.training import build
from kd.training.build import (
    build_live_teacher,
    build_rollouts,
    build_student,
    choose_layout,
    gathers_whole,
)
from kd.training.step import train_step

HALF = {"rollout.fraction": 0.5, "rollout.max_new_tokens": 12}
ALL = {"rollout.fraction": 1.0, "rollout.max_new_tokens": 12}
BUDGET = {"training.max_tokens_per_micro_batch": 90, "training.sequence_layout": "packed"}
LORA = {"student.lora": {"rank": 4}}
CASES: dict[str, dict[str, Any]] = {
    "zero1": {"deepspeed.student": "zero1_fp32.json", **HALF},
    "zero2, two samples, packed": {
        "deepspeed.student": "zero2_fp32.json",
        "rollout.samples_per_prompt": 2,
        **HALF,
        **BUDGET,
    },
    "zero3 whole": {"rollout.gather": "whole", **HALF},
    "zero3 by layers": {"rollout.gather": "layers", "teacher.shard": "world", **HALF},
    "zero3 all": {"rollout.gather": "auto", "rollout.temperature": 1.5, **ALL},
    "adapters": {"deepspeed.student": "zero2_fp32.json", **LORA, **ALL},
    "adapters, zero3": {**LORA, **HALF},
    "teacher's": {"rollout.source": "teacher", "rollout.top_p": 0.9, **HALF},
    "teacher's, divided": {"rollout.source": "teacher", "teacher.shard": "world", **ALL},
}
STEP = 3


def main() -> None:
    # Adapters that change what is sampled, and that no checkpoint has
    build.verify_weights = lambda *_, **__: None  # type: ignore[attr-defined]
    build.set_trained = lambda *arguments: set_trained(*arguments, std=0.2)  # type: ignore[attr-defined]
    recipe, folder, output = load_recipe(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    layout = init_distributed()
    tokenizer = load_tokenizers(recipe)
    examples = load_data(recipe, tokenizer).train
    results: dict[str, Any] = {}
    for name, changes in CASES.items():
        values = {"teacher.shard": "gpu", "training.max_grad_norm": 1e9, **changes}
        if (own := folder / str(values.get("deepspeed.student"))).exists():
            values["deepspeed.student"] = str(own)
        of_case = recipe.with_values(values)
        found = _one_case(of_case, Examples(of_case, *_arrays(examples)), tokenizer, layout)
        if layout.rank == 0:
            results[name] = found
    if layout.rank == 0:
        output.write_text(json.dumps(results))
    dist.barrier()


def _arrays(examples: Examples) -> tuple[Any, ...]:
    return examples.table, examples.row_N, examples.num_tokens_N3, examples.first_row_S


def _one_case(
    recipe: Recipe, examples: Examples, tokenizer: PreTrainedTokenizerFast, layout: Layout
) -> dict[str, Any]:
    teacher = build_live_teacher(recipe, layout)
    student = build_student(recipe, student_ds_config(recipe, layout.world_size, "cpu"), layout)
    shape = batch_shape(recipe, choose_layout(recipe, student, teacher))
    loader = Loader(examples, shape, recipe.run.seed, tokenizer.pad_token_id)
    whole = gathers_whole(recipe, layout)
    rollouts = build_rollouts(recipe, loader, student, teacher, tokenizer, layout, whole=whole)
    captured = capture_gradients(student)
    before = torch.get_rng_state()
    sampled, figures = rollouts.of_step(STEP)
    assert torch.equal(torch.get_rng_state(), before), "dropout would see what was sampled"
    batches = loader.micro_batches(STEP, layout) + sampled
    result = train_step(student, teacher, batches, 0.0, layout)
    if layout.rank != 0:
        return {}
    expected, loss, gradients = _reference(recipe, loader, tokenizer)
    return {
        "loss": [result.loss, loss],
        "gradient": relative_error(captured, gradients),
        "responses": [[r.token_ids for _, r in rollouts.samples], expected],
        "num_rollouts": recipe.num_rollouts,
        "tokens_of_rollouts": result.diagnostics["by_source"][-1],
        "record": figures.as_record(1.0),
    }


def _reference(
    recipe: Recipe, loader: Loader, tokenizer: PreTrainedTokenizerFast
) -> tuple[list[list[int]], float, dict[str, torch.Tensor]]:
    """Responses, loss and gradients of one process, full logits, plain autograd."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(section.model, dtype=torch.float32)
        for section in (recipe.student, recipe.teacher)
    )
    set_trained(student, recipe.student, recipe.run.seed, std=0.2)
    writer: PreTrainedModel = student if recipe.rollout.source == "student" else teacher
    examples, pad = loader.examples, loader.pad_token_id
    section, responses, sampled = recipe.rollout, [], []
    sampling = Sampling(section.max_new_tokens, section.temperature, section.top_p)
    for number, i in enumerate(loader.rollouts(STEP)):
        prompt = examples.prompt_ids(int(i))
        seed = random.Random(f"{recipe.run.seed}/{STEP}/{number}").getrandbits(63)
        end_ids = [tokenizer.eos_token_id]
        with torch.no_grad():
            (ids,) = generate_tokens(
                writer.eval(),
                [prompt.tolist()],
                [seed],
                sampling,
                end_ids=end_ids,
                pad_id=pad,
            )
        responses.append(ids)
        response = sampled_response(prompt, ids, tokenizer.decode, "</think>", set(end_ids))
        example = as_example(response, recipe.data.loss_sections, 0, 0)
        sampled.append(collate([example], pad))
    chosen = [i for rank in loader.plan_step(STEP, 1).micro_batches for m in rank for i in m]
    own = [collate([examples[int(i)]], pad) for i in chosen]
    num_tokens = sum(batch.num_supervised_tokens for batch in own + sampled)
    of_sampled = recipe.model_copy(update={"loss": recipe.rollout_loss})
    student.train()
    losses = [full_loss(recipe, student, teacher, batch) for batch in own]
    losses += [full_loss(of_sampled, student, teacher, batch) for batch in sampled]
    loss = torch.stack(losses).sum() / num_tokens
    loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.requires_grad}
    return responses, float(loss), gradients


if __name__ == "__main__":
    main()
