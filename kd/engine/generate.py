"""A model in an engine, ready to generate."""

import contextlib
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from kd.engine.engine import Engine
from kd.engine.zero3 import is_partitioned, whole_and_unhooked


@contextlib.contextmanager
def generating(
    model: PreTrainedModel, engine: Engine | None, *, whole: bool
) -> Iterator[tuple[PreTrainedModel, bool]]:
    """(the model, whether ranks must generate in step): a model that each rank has whole as it is,
    one that ZeRO-3 divides gathered as a whole or, layer by layer, for each token.

    Collective: every rank must enter it.
    """
    if engine is None or not is_partitioned(model.parameters()):
        with torch.no_grad():
            yield model, False
    elif whole:
        with torch.no_grad(), whole_and_unhooked(engine, model):
            yield model, False
    else:
        with torch.no_grad():
            yield model, True
