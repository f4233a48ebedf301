"""The sampled part of a global batch: read Rollouts.of_step() from top to bottom.

A function of run.seed and the step alone, and of the model's weights: nothing to save, nothing to
restore on resume. Each response is drawn by a seed of its own, so that neither the number of ranks
nor its neighbours in a batch choose other tokens; sums in another order may.
"""

import contextlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kd.data.collate import Batch, collate
from kd.data.loader import Loader
from kd.data.step_plan import deal
from kd.data.truncate import IntArray
from kd.distributed.layout import Layout
from kd.distributed.process_group import gather_objects
from kd.errors import UserError
from kd.generation.sampling import end_token_ids
from kd.generation.server import Server, connect, in_parallel
from kd.generation.tokens import generate_tokens
from kd.recipe import Recipe
from kd.rollouts.sampled import SampledResponse, as_example, sampled_response


def connected(recipe: Recipe) -> Server:
    """The server of rollout.server, once it says that it serves the teacher. Raises UserError."""
    assert recipe.rollout is not None
    assert recipe.rollout.server is not None
    assert recipe.teacher is not None
    try:
        return connect(recipe.rollout.server, "teacher.model", recipe.teacher)
    except UserError as error:
        raise UserError(str(error).replace("--server", "rollout.server =", 1)) from None


class Sampler(Protocol):
    """A student or a teacher that writes."""

    def generating(
        self, *, whole: bool
    ) -> contextlib.AbstractContextManager[tuple[PreTrainedModel, bool]]:
        """The model, ready to generate, and whether ranks must do so in step. Collective."""


@dataclass(frozen=True)
class RolloutFigures:
    """Of one step over all ranks. seconds: of this rank, until the batches were there.

    Shapes: R responses.
    """

    num_sequences: int
    num_tokens: int  # of responses
    num_ended: int
    num_closed: int
    num_without_label: int
    seconds: float
    # Tokens of each prompt, and of its response
    prompt_R: IntArray
    response_R: IntArray

    def as_record(self, step_seconds: float) -> dict[str, Any]:
        """Of metrics.jsonl."""
        return {
            "num_sequences": self.num_sequences,
            "mean_tokens": self.num_tokens / self.num_sequences,
            "ended_fraction": self.num_ended / self.num_sequences,
            "closed_fraction": self.num_closed / self.num_sequences,
            "num_without_label": self.num_without_label,
            "share_of_step": self.seconds / step_seconds,
        }


class Rollouts:
    """Samples responses in the place of the data's own."""

    def __init__(
        self,
        recipe: Recipe,
        loader: Loader,
        sampler: Sampler,
        tokenizer: PreTrainedTokenizerFast,
        layout: Layout,
        *,
        whole: bool,
    ) -> None:
        """whole: a partitioned model is gathered for as long as it samples."""
        assert recipe.rollout is not None
        self.recipe, self.section = recipe, recipe.rollout
        self._loader, self._examples = loader, loader.examples
        self._sampler, self._tokenizer, self._layout = sampler, tokenizer, layout
        self._whole = whole
        self._server = connected(recipe) if self.section.server else None
        # Of the model that writes; a server adds those of its own configuration
        self._end_ids = {int(tokenizer.eos_token_id)}
        self.samples: list[tuple[int, SampledResponse]] = []  # (row from 0, response), last step's

    def of_step(self, step: int) -> tuple[list[Batch], RolloutFigures]:
        """This rank's micro-batches of sampled responses, as many as every other rank's.

        Collective: every rank must call this.
        """
        started = time.perf_counter()
        chosen = self._loader.rollouts(step)
        prompts = [self._examples.prompt_ids(int(i)) for i in chosen]
        token_ids = self._sample(step, prompts)
        responses = [
            sampled_response(
                prompt,
                ids,
                self._decode,
                self.recipe.data.think_close.strip(),
                self._end_ids,
            )
            for prompt, ids in zip(prompts, token_ids, strict=True)
        ]
        rows = [int(self._examples.row_N[i]) for i in chosen]
        self.samples = list(zip(rows, responses, strict=True))
        batches, num_without_label = self._batches()
        figures = RolloutFigures(
            num_sequences=len(responses),
            num_tokens=sum(map(len, token_ids)),
            num_ended=sum(response.ended for response in responses),
            num_closed=sum(response.closed for response in responses),
            num_without_label=num_without_label,
            seconds=time.perf_counter() - started,
            prompt_R=np.array([len(ids) for ids in prompts]),
            response_R=np.array([len(ids) for ids in token_ids]),
        )
        return batches, figures

    def first_sample(self, step: int) -> dict[str, Any]:
        """Of the last step, which this was, counted from 1: what a person would look at."""
        row, response = self.samples[0]
        return {
            "step": step,
            "row": row + 1,
            "prompt": self._decode(response.prompt_ids.tolist()),
            "response": self._decode(response.token_ids),
            "num_tokens": len(response.token_ids),
            "ended": response.ended,
            "closed": response.closed,
        }

    def _sample(self, step: int, prompts: Sequence[IntArray]) -> list[list[int]]:
        """A response to each prompt, on every rank."""
        problem = None
        try:
            mine = self._ask(step, prompts) if self._server else self._generate(step, prompts)
        except UserError as error:  # a server that has gone: every rank says so
            mine, problem = {}, str(error)
        everyones: dict[int, list[int]] = {}
        for part, said in gather_objects((mine, problem)):
            if said is not None:
                raise UserError(said)
            everyones |= part
        return [everyones[i] for i in range(len(prompts))]

    def _generate(self, step: int, prompts: Sequence[IntArray]) -> dict[int, list[int]]:
        """This rank's share, by number. Dealt as if all were as long as they may be."""
        room = np.array([len(ids) + self.section.max_new_tokens for ids in prompts])
        mine: dict[int, list[int]] = {}
        with self._sampler.generating(whole=self._whole) as (model, in_step):
            self._end_ids = set(end_token_ids(model, self._tokenizer))
            for micro in self._deal(room):
                if not len(micro) and not in_step:
                    continue
                numbers = [int(i) for i in micro]
                # A rank without a prompt of its own takes part in every gather
                of_micro = [prompts[i].tolist() for i in numbers] or [prompts[0].tolist()]
                found = generate_tokens(
                    model,
                    of_micro,
                    [self._seed(step, i) for i in numbers] or [0],
                    max_new_tokens=self.section.max_new_tokens,
                    temperature=self.section.temperature,
                    top_p=self.section.top_p,
                    end_ids=sorted(self._end_ids),
                    pad_id=self._loader.pad_token_id,
                    in_step=in_step,
                )
                mine |= dict(zip(numbers, found, strict=False))
        return mine

    def _ask(self, step: int, prompts: Sequence[IntArray]) -> dict[int, list[int]]:
        """This rank's share, by number, of a server, which batches what all ranks ask for."""
        server = self._server
        assert server is not None

        def respond(number: int) -> list[int]:
            # Whatever the request leaves open, the server takes from the model's configuration
            choice = server.complete(
                prompts[number].tolist(),
                max_tokens=self.section.max_new_tokens,
                temperature=self.section.temperature,
                top_p=self.section.top_p,
                top_k=0,
                min_p=0.0,
                repetition_penalty=1.0,
                seed=self._seed(step, number),
                stop_token_ids=sorted(self._end_ids),
                return_token_ids=True,
            )
            if choice.get("token_ids") is None:
                raise UserError(
                    f"rollout.server = {server.url!r}: vLLM {server.version} returns no token ids: "
                    "serve with a later one"
                )
            token_ids: list[int] = choice["token_ids"]
            return token_ids

        layout = self._layout
        share = range(layout.data_parallel_rank, len(prompts), layout.data_parallel_size)
        return dict(zip(share, in_parallel(respond, share), strict=True))

    def _batches(self) -> tuple[list[Batch], int]:
        sections, source = self.recipe.data.loss_sections, self._examples.num_sources
        examples = [as_example(r, sections, row, source) for row, r in self.samples]
        lengths = np.array([len(example.input_ids) for example in examples])
        batches = [
            replace(
                collate(
                    [examples[i] for i in micro],
                    self._loader.pad_token_id,
                    self._loader.shape.layout,
                    self._loader.num_sources,
                ),
                is_sampled=True,
            )
            for micro in self._deal(lengths)
        ]
        return batches, sum(not (example.labels[1:] >= 0).any() for example in examples)

    def _deal(self, length_G: IntArray) -> tuple[IntArray, ...]:
        """This rank's micro-batches of sequences of these lengths."""
        dealt = deal(length_G, self._loader.shape, self._layout.data_parallel_size)
        return dealt[self._layout.data_parallel_rank]

    def _seed(self, step: int, number: int) -> int:
        return random.Random(f"{self.recipe.run.seed}/{step}/{number}").getrandbits(63)

    def _decode(self, token_ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )
