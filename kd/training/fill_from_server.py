"""Fill a top_k cache from a server of vLLM that has the teacher; none is loaded but to compare.

vLLM says which tokens are likeliest in the place of each token of a prompt, given those before it
(prompt_logprobs), so that what it says of token t + 1 is the teacher's at position t. For the last
position it says it of the token that it has to generate: no label follows there and training reads
nothing of it, but the cache then holds what one of a live teacher holds.

Temperature must be 1: prompt_logprobs pass no sampling processor. Those of vLLM 0.32 were the same
at temperature 2 as at 1, and its source says so of the processed modes too.

Shapes: T tokens of a trace, K tokens of the teacher.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kd.cache.kinds import Fields, Heads, Kind, TopKKind
from kd.cache.store import SHARD_BYTES, ShardWriter, open_cache
from kd.data.dataset import Example, load_data
from kd.data.tokenizers import load_tokenizers
from kd.distributed.interruption import Interruption
from kd.errors import Interrupted, UserError
from kd.generation.generator import load_generator
from kd.generation.server import Server, connect, in_parallel
from kd.logs import configure_logging
from kd.models.head import head_of, hidden_states
from kd.models.weights import weights_folder
from kd.recipe import Recipe, TeacherSection
from kd.runs.lock import hold
from kd.training.cache_identity import make_manifest
from kd.training.fill_cache import finish, groups, missing_rows, prepare, whole_traces

log = logging.getLogger(__name__)

NUM_CHECKED = 4  # rows that are read twice
ROWS_PER_GROUP = 16  # read at a time; a long trace is tens of MB of JSON
NUM_SPARE = 16  # tokens asked for beyond K where the student lacks some of the teacher's
# Total variation of the K likeliest, mean of a token: of two readings in other batches, and of the
# server and the teacher here. In float32 it was 1e-8, and 0.003 with noise in the weights of a
# tenth of their spread; of models in bf16 nothing was measured, and the bounds leave them room.
READINGS_BOUND, LOCAL_BOUND = 0.01, 0.03


def fill_from_server(
    recipe: Recipe,
    kind: Kind,
    folder: Path,
    url: str,
    interruption: Interruption,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Bring the cache in folder to hold every row of the recipe's data, as fill_cache does, in one
    process: the server is what computes.

    Raises UserError for what the user can put right: among it a server whose numbers are not those
    of the teacher, or change between two readings. Raises Interrupted when that was requested.
    """
    _check_arguments(kind, url)
    assert isinstance(kind, TopKKind)
    recipe = whole_traces(recipe)
    assert recipe.teacher is not None
    configure_logging(rank=0)
    interruption.arm()
    hold(folder)
    tokenizer = load_tokenizers(recipe)
    data = load_data(recipe, tokenizer)
    server = connect(url, "teacher.model", recipe.teacher)
    manifest = make_manifest(recipe, kind, tokenizer, server=f"vllm {server.version}")
    prepare(folder, manifest)
    missing = missing_rows(open_cache(folder), data)
    log.info("%s: filling %d rows from %s", folder, len(missing), url)
    reader = Reader(server, kind, manifest.vocab_size, manifest.teacher.vocab_size)
    if missing:
        spread = range(0, len(missing), -(-len(missing) // NUM_CHECKED))
        examples = [missing[number][0][missing[number][1]] for number in spread]
        check_server(reader, recipe.teacher, examples)
    writer = ShardWriter(folder, "server", shard_bytes)
    bar = tqdm(total=len(missing), unit="row", disable=None)
    interrupted = False
    try:
        for group in groups(missing, ROWS_PER_GROUP):
            for example, fields in zip(group, in_parallel(reader.read, group), strict=True):
                writer.add(example.key, fields)
            bar.update(len(group))
            interrupted = interruption.is_requested()
            if interrupted:
                break
        writer.flush()
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror}: free some space and run the same command again"
        ) from None
    if interrupted:
        raise Interrupted
    finish(folder, data, recipe, kind)


class Reader:
    """What a server says of a trace, as a cache of this kind holds it."""

    def __init__(
        self, server: Server, kind: TopKKind, vocab_size: int, teacher_vocab_size: int
    ) -> None:
        """vocab_size: that teacher and student share. Raises UserError for a K above it."""
        if kind.k > vocab_size:
            raise UserError(
                f"--num-tokens {kind.k}: the models share only {vocab_size} tokens; lower it"
            )
        self.server, self.kind, self.vocab_size = server, kind, vocab_size
        self.num_asked = kind.k + min(teacher_vocab_size - vocab_size, NUM_SPARE)

    def read(self, example: Example) -> Fields:
        """ids int32 and logprobs fp32, (T, K) each, the likeliest first."""
        choice = self.server.complete(
            example.input_ids.tolist(),
            max_tokens=1,
            temperature=1.0,
            prompt_logprobs=self.num_asked,
            logprobs=self.num_asked,
            return_tokens_as_token_ids=True,
        )
        try:
            found = [
                {int(token): entry["logprob"] for token, entry in position.items()}
                for position in choice["prompt_logprobs"][1:]  # of the first there is none
            ]
            last = choice["logprobs"]["top_logprobs"][0]
            found.append({int(key.removeprefix("token_id:")): last[key] for key in last})
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            raise UserError(
                f"--server {self.server.url}: its answer lacks prompt_logprobs or logprobs: name "
                "a vLLM server"
            ) from None
        rows = [self._likeliest(position) for position in found]
        return {
            "ids": torch.tensor([[token for token, _ in row] for row in rows], dtype=torch.int32),
            "logprobs": torch.tensor([[logprob for _, logprob in row] for row in rows]),
        }

    def _likeliest(self, position: Mapping[int, float]) -> list[tuple[int, float]]:
        """K of the shared tokens: vLLM adds the token that is there, however unlikely."""
        shared = [item for item in position.items() if item[0] < self.vocab_size]
        if len(shared) < self.kind.k:
            raise UserError(
                f"--num-tokens {self.kind.k}: the student has only {len(shared)} of the teacher's "
                f"{self.num_asked} most likely tokens; lower it"
            )
        return sorted(shared, key=lambda item: -item[1])[: self.kind.k]


def check_server(reader: Reader, teacher: TeacherSection, examples: list[Example]) -> None:
    """Raise UserError unless two readings agree, one row at a time and all at once, and agree with
    the teacher where its weights are here.
    """
    try:
        first = [reader.read(example) for example in examples]
    except UserError as error:
        longest = max(len(example.input_ids) for example in examples)
        raise UserError(
            f"{error}\n"
            f"--num-tokens {reader.kind.k} needs a server with --max-logprobs {reader.num_asked} "
            f"or more, and the longest trace needs --max-model-len {longest + 1} or more"
        ) from None
    second = in_parallel(reader.read, [*examples, *reversed(examples)])[: len(examples)]
    pairs = {"its second answer": (second, READINGS_BOUND)}
    try:
        weights_folder(teacher, role="teacher")
        pairs["the local teacher"] = (_of_teacher(reader, teacher, examples), LOCAL_BOUND)
    except UserError as error:
        log.warning("could not compare the server with the teacher's weights: %s", error)
    for name, (other, bound) in pairs.items():
        distance = mean_distance(first, other)
        log.info("%d rows: the server and %s differ by %.2g", len(examples), name, distance)
        if not distance <= bound:
            raise UserError(
                f"--server {reader.server.url} and {name} differ by {distance:.3g} in total "
                f"variation (mean per token over {len(examples)} rows), more than the {bound} "
                f"allowed: check that it serves teacher.model = {teacher.model!r} unquantised, in "
                "the dtype of its weights"
            )


def mean_distance(left: list[Fields], right: list[Fields]) -> float:
    """Half of the sum of |p - q| over the tokens that either names, mean of all tokens of all rows:
    0 to 1.
    """
    distances = []
    for row, other in zip(left, right, strict=True):
        p_T, q_T = (_probabilities(fields) for fields in (row, other))
        for p, q in zip(p_T, q_T, strict=True):
            distances.append(sum(abs(p.get(t, 0.0) - q.get(t, 0.0)) for t in p.keys() | q) / 2)
    return sum(distances) / len(distances)


def _probabilities(fields: Fields) -> list[dict[int, float]]:
    ids_TK, probability_TK = fields["ids"].tolist(), fields["logprobs"].exp().tolist()
    return [dict(zip(*row, strict=True)) for row in zip(ids_TK, probability_TK, strict=True)]


@torch.inference_mode()
def _of_teacher(reader: Reader, teacher: TeacherSection, examples: list[Example]) -> list[Fields]:
    model = load_generator("teacher.model", teacher)
    heads = Heads(head_of(model), None, reader.vocab_size)
    found = []
    for example in examples:
        inputs: dict[str, Any] = {"input_ids": torch.from_numpy(example.input_ids)[None]}
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        hidden_1TH = hidden_states(model, inputs)
        fields = reader.kind.encode(hidden_1TH[0], heads, seed=0)
        found.append({name: tensor.cpu() for name, tensor in fields.items()})
    return found


def _check_arguments(kind: Kind, url: str) -> None:
    if not isinstance(kind, TopKKind):
        raise UserError(
            f"--kind {kind.name} with --server {url}: a server gives only the most likely tokens; "
            "set --kind top_k, or leave out --server"
        )
    if kind.temperature != 1.0:
        raise UserError(
            f"loss.temperature = {kind.temperature} with --server {url}: a server gives "
            "probabilities only at temperature 1; set loss.temperature = 1.0, or leave out "
            "--server"
        )
    num_ranks = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1")))
    if num_ranks > 1:
        raise UserError(
            f"WORLD_SIZE = {num_ranks} with --server {url}: a single process asks the server; "
            "start launch/cache.py with python"
        )
