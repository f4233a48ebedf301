"""Whose cache it is: the teacher, the way rows become tokens, and whether it holds all of them."""

import hashlib
import logging
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from kd.cache.cache_records import CachedModel, CachedTokens, CacheManifest
from kd.cache.kinds import (
    HiddenKind,
    Kind,
    TopKKind,
    VectorKind,
    head_sha256,
    parameters_of,
)
from kd.cache.store import Cache
from kd.data.dataset import Data
from kd.engine.ds_config import is_bf16, read_ds_config
from kd.errors import UserError
from kd.losses import Head
from kd.models.weights import load_head, weights_folder, weights_sha256
from kd.plan.shapes import model_shapes
from kd.recipe import Recipe

log = logging.getLogger(__name__)

ELSEWHERE = "not here"  # in the place of a hash, where only a server had the weights


def make_manifest(
    recipe: Recipe,
    kind: Kind,
    tokenizer: PreTrainedTokenizerFast,
    weights: str | None = None,
    server: str | None = None,
) -> CacheManifest:
    """Of what a cache for this recipe would hold. weights: SHA-256 of the teacher's, where they
    need not be read. server: what fills it; the weights may then be only there.
    """
    teacher = recipe.teacher
    assert teacher is not None
    shapes = model_shapes(teacher, role="teacher")
    student = model_shapes(recipe.student, role="student")
    if weights is None:
        try:
            weights = weights_sha256(teacher, role="teacher")
        except UserError:
            if server is None:
                raise
            weights = ELSEWHERE
    backend = tokenizer.backend_tokenizer.to_str().encode()
    return CacheManifest(
        kind=kind.name,
        parameters=parameters_of(kind),
        vocab_size=min(shapes.vocab_size, student.vocab_size),
        teacher=CachedModel(
            model=teacher.model,
            revision=teacher.revision,
            weights_sha256=weights,
            hidden_size=shapes.hidden_size,
            vocab_size=shapes.vocab_size,
        ),
        server=server,
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
            f"{folder} is the cache of another teacher, kind or tokenisation:\n"
            f"{listing}\n"
            "Use the settings that it was filled with, or fill another folder"
        )


def check_is_of(cache: Cache, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise UserError unless the cache is of the recipe's teacher and tokens.

    Where the teacher's weights are not here, which only a cache of hidden states needs, its name
    and revision are all that is compared.
    """
    assert recipe.teacher is not None
    there = cache.manifest
    weights = ELSEWHERE if there.teacher.weights_sha256 == ELSEWHERE else None
    try:
        weights_folder(recipe.teacher, role="teacher")
    except UserError as error:
        if isinstance(cache.kind, HiddenKind):
            raise
        log.warning(
            "teacher.cache: could not check that it belongs to the teacher's weights: %s", error
        )
        weights = there.teacher.weights_sha256
    here = make_manifest(recipe, cache.kind, tokenizer, weights, there.server)
    check_same(there, here, cache.folder)


def student_head(recipe: Recipe, device: torch.device) -> Head:
    """The student's head as its checkpoint has it, in the dtype in which it is trained."""
    is_wide = not is_bf16(read_ds_config(recipe, "student"))
    dtype = torch.float32 if is_wide else torch.bfloat16
    head = load_head(recipe.student, role="student", dtype=dtype)
    bias_V = None if head.bias_V is None else head.bias_V.to(device)
    return head._replace(weight_VH=head.weight_VH.to(device), bias_V=bias_V)


def check_serves(kind: Kind, recipe: Recipe, where: str) -> None:
    """Raise UserError for a loss that a cache of this kind knows too little for."""
    loss = recipe.loss
    if isinstance(kind, HiddenKind):
        return
    if kind.temperature != loss.temperature:
        raise UserError(
            f"{where} was filled at temperature {kind.temperature}, but loss.temperature = "
            f"{loss.temperature}: set the cache's temperature, or fill another cache"
        )
    if isinstance(kind, TopKKind):
        return
    if loss.divergence != "forward_kl":
        raise UserError(
            f"{where} is of kind {kind.name}, which serves only forward_kl, but loss.divergence = "
            f"{loss.divergence!r}: set forward_kl, or fill a cache of hidden states"
        )
    if isinstance(kind, VectorKind):
        if recipe.student.trains_head:
            raise UserError(
                f"{where} is of kind vector, made with the student's head, but this recipe trains "
                "that head: set student.freeze_head = true, or fill a cache of hidden states"
            )
        ours = head_sha256(student_head(recipe, torch.device("cpu")))
        if ours != kind.head_sha256:
            raise UserError(
                f"{where} was made with another student's head: SHA-256 {kind.head_sha256} there, "
                f"{ours} of {recipe.student.model!r} here: fill a cache for this student"
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
                f"{where} lacks {len(missing)} of {len(examples)} {name} rows, such as {rows} "
                "(counted from 1): run launch/cache.py with this recipe, which fills only these"
            )
