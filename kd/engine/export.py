"""A trained student as an ordinary Hugging Face folder: weights, tokenizer, generation config."""

import shutil
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from kd.engine.engine import Engine
from kd.engine.zero3 import consolidated_state_dict
from kd.errors import UserError

MODEL_PREFIX = "model."  # StudentModule.model


def export_student(
    engine: Engine, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write the engine's student to `folder`, aside first and then renamed over what was there.

    Collective: every rank must call this.
    """
    state_dict = consolidated_state_dict(engine)
    if dist.get_rank() == 0:
        assert state_dict is not None
        weights = {name.removeprefix(MODEL_PREFIX): tensor for name, tensor in state_dict.items()}
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            model.generation_config = _generation_config(model, tokenizer)
            model.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
            # Weights are written for the owner only; others may load a model.
            for weights_file in partial.glob("*.safetensors"):
                shutil.copymode(partial / "config.json", weights_file)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"the student could not be exported to {folder}: {error}; --resume auto tries again"
            ) from error
    dist.barrier()


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """The student's own, made to stop at the end token that it was trained on."""
    config = model.generation_config or GenerationConfig()
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    config.do_sample = False
    config.temperature = config.top_p = config.top_k = None
    return config
