"""What a fingerprint of responses covers, and how problems come to be requests."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from kd.evaluate.evaluation import evaluate, local_problems, settings_of
from kd.generation.backends import Request, Subject, choose_backend, make_subject
from kd.generation.responses import fingerprint
from kd.generation.sampling import Sampling
from kd.recipe import ModelSection, load_recipe

REQUESTS = [Request("a/0", "1+1"), Request("b/0", "2+2")]
TRANSFORMERS = choose_backend("transformers")
SAMPLING = Sampling(max_new_tokens=5, temperature=0.6, top_p=0.95, seed=7)


@pytest.fixture
def subject(model_dir: Path) -> Subject:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return make_subject("m", ModelSection(model=str(model_dir)), tokenizer, SAMPLING, TRANSFORMERS)


def test_the_fingerprint_changes_with_sampling_revision_prompts_and_batches(
    subject: Subject,
) -> None:
    def of(changed: Subject, requests: list[Request] = REQUESTS, batch_size: int = 4) -> str:
        return fingerprint(settings_of(changed, requests, batch_size))

    samplings = [
        replace(SAMPLING, **change)
        for change in ({"seed": 8}, {"temperature": 0.7}, {"max_new_tokens": 6})
    ]
    others = [of(replace(subject, sampling=sampling)) for sampling in samplings]
    others += [of(replace(subject, section=subject.section.model_copy(update={"revision": "v2"})))]
    others += [of(subject, [Request("a/0", "1+1"), Request("b/0", "2+3")])]
    others += [
        of(subject, [*REQUESTS, Request("b/1", "2+2")]),
        of(subject, REQUESTS[:1]),
        of(subject, batch_size=2),
    ]
    assert of(subject) == of(replace(subject, label="other"))
    assert len({of(subject), *others}) == 1 + len(others)


@pytest.mark.process
def test_a_model_trained_anew_in_the_same_folder_is_evaluated_anew(
    subject: Subject, recipe_path: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(str(recipe_path))
    problems = local_problems(recipe.evaluation, num_samples=2, limit=4)
    folder = Path(subject.section.model)
    before = evaluate(recipe, subject, problems, tmp_path)
    assert (
        evaluate(recipe, replace(subject, load=lambda: pytest.fail("loaded")), problems, tmp_path)
        == before
    )
    weights = load_file(folder / "model.safetensors")
    try:
        zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        save_file(zeros, folder / "model.safetensors", metadata={"format": "pt"})
        anew = make_subject("m", subject.section, subject.tokenizer, SAMPLING, TRANSFORMERS)
        assert evaluate(recipe, anew, problems, tmp_path)["fingerprint"] != before["fingerprint"]
    finally:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "replaced" / before["fingerprint"] / "m.responses.jsonl").exists()
