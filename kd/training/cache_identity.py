"""Whose cache it is: the teacher, the way rows become tokens, and whether it holds all of them."""

import hashlib
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from kd.cache.cache_records import CachedModel, CachedTokens, CacheManifest
from kd.cache.kinds import Kind, parameters_of
from kd.cache.store import Cache
from kd.data.dataset import Data
from kd.errors import UserError
from kd.models.weights import weights_sha256
from kd.plan.shapes import model_shapes
from kd.recipe import Recipe


def make_manifest(recipe: Recipe, kind: Kind, tokenizer: PreTrainedTokenizerFast) -> CacheManifest:
    """Of what a cache for this recipe would hold."""
    teacher = recipe.teacher
    assert teacher is not None
    shapes = model_shapes(teacher, role="teacher")
    student = model_shapes(recipe.student, role="student")
    backend = tokenizer.backend_tokenizer.to_str().encode()
    return CacheManifest(
        kind=kind.name,
        parameters=parameters_of(kind),
        vocab_size=min(shapes.vocab_size, student.vocab_size),
        teacher=CachedModel(
            model=teacher.model,
            revision=teacher.revision,
            weights_sha256=weights_sha256(teacher, role="teacher"),
            hidden_size=shapes.hidden_size,
            vocab_size=shapes.vocab_size,
        ),
        tokens=CachedTokens(
            tokenizer_sha256=hashlib.sha256(backend).hexdigest(),
            chat_template=tokenizer.chat_template,
        ),
    )


def check_same(there: CacheManifest, here: CacheManifest, folder: Path) -> None:
    """Raise UserError that names each value in which a cache is another."""
    old, new = there.model_dump(), here.model_dump()
    differing = [
        f"  {key}: {old[key]!r} there, {new[key]!r} here" for key in new if old.get(key) != new[key]
    ]
    if differing:
        listing = "\n".join(differing)
        raise UserError(
            f"{folder} is the cache of another teacher, kind or way to make tokens:\n{listing}\n"
            "Use what it was filled with, or fill another folder"
        )


def check_holds(cache: Cache, data: Data, where: str) -> None:
    """Raise UserError unless every row of the data is there."""
    splits = {"training": data.train, "validation": data.validation}
    for name, examples in splits.items():
        if examples is None:
            continue
        missing = [i for i in range(len(examples)) if examples.key(i) not in cache]
        if missing:
            rows = ", ".join(str(int(examples.row_N[i]) + 1) for i in missing[:5])
            raise UserError(
                f"{where} lacks {len(missing)} of {len(examples)} {name} rows, the first of them "
                f"{rows} (counted from 1): run launch/cache.py with this recipe, which fills them "
                "alone"
            )
