"""A trained student as an ordinary Hugging Face folder: weights, tokenizer, generation config; and
its adapters, where it has any, once more in a folder of their own.
"""

import shutil
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from kd.engine.adapters import has_adapters, merged_weights, save_adapter
from kd.engine.engine import Engine
from kd.engine.zero3 import consolidated_state_dict
from kd.errors import UserError

MODEL_PREFIX = "model."  # StudentModule.model


def export_student(
    engine: Engine, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write the engine's student to `folder`, aside first and then renamed over what was there.
    set_generation_config() has been called for the model. Adapters are merged, and written to
    folder/adapter too.

    Collective: every rank must call this.
    """
    state_dict = consolidated_state_dict(engine)
    if dist.get_rank() == 0:
        assert state_dict is not None
        weights = {name.removeprefix(MODEL_PREFIX): tensor for name, tensor in state_dict.items()}
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            model.save_pretrained(partial, state_dict=merged_weights(model, weights))
            if has_adapters(model):
                save_adapter(model, weights, partial / "adapter")
            tokenizer.save_pretrained(partial)
            # Weights are written for the owner only; others may load a model.
            for weights_file in partial.rglob("*.safetensors"):
                shutil.copymode(partial / "config.json", weights_file)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"the student could not be exported to {folder}: {error}; run again with --resume "
                "auto to retry"
            ) from error
    dist.barrier()


def set_generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model the generation config that its export will have: a new one, which ends where
    the model was trained to end and where it did before, and samples as whoever loads it chooses.

    What else the checkpoint's own said (min_p, beams) is left out: transformers refuses to save
    some of it. config.json says the same of the end. Raises UserError for an end that is no id.
    """
    own = model.generation_config or GenerationConfig()
    ends = own.eos_token_id if own.eos_token_id is not None else model.config.eos_token_id
    others = ends if isinstance(ends, list | tuple) else [] if ends is None else [ends]
    if not all(type(token_id) is int and token_id >= 0 for token_id in others):
        raise UserError(
            f"student.model: eos_token_id = {ends!r} in its generation_config.json or "
            "config.json: write one id of the vocabulary, or a list of them"
        )
    trained = tokenizer.eos_token_id
    all_ends = [trained, *dict.fromkeys(other for other in others if other != trained)]
    config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=all_ends if len(all_ends) > 1 else trained,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.validate(strict=True)
    model.generation_config = config
    model.config.eos_token_id, model.config.pad_token_id = config.eos_token_id, config.pad_token_id
