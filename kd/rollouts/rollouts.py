"""The sampled part of a global batch: read Rollouts.of_step() from top to bottom.

A function of run.seed, the step and the model's weights: nothing to save, nothing to
restore on resume. Each response is drawn by a seed of its own, so that neither the number of ranks
nor its neighbours in a batch choose other tokens; sums in another order may.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from kd.data.collate import Batch, collate
from kd.data.loader import Loader
from kd.data.step_plan import deal
from kd.data.truncate import IntArray
from kd.distributed.layout import Layout
from kd.distributed.process_group import gather_numbered, gather_objects
from kd.errors import UserError
from kd.generation.sampling import Sampling, decode, end_token_ids
from kd.generation.server import Server, connect, in_parallel, sampling_parameters
from kd.generation.tokens import Writer, generate_share
from kd.recipe import Recipe
from kd.rollouts.sampled import SampledResponse, as_example, sampled_response


@dataclass(frozen=True)
class RolloutFigures:
    """Of one step over all ranks. seconds: of this rank, until the batches were there.

    Shapes: R responses.
    """

    responses: tuple[SampledResponse, ...]
    num_without_label: int
    seconds: float

    @property
    def lengths(self) -> tuple[IntArray, IntArray]:
        """Tokens of each prompt, and of its response: int64 (R,) each."""
        prompt_R = np.array([len(response.prompt_ids) for response in self.responses])
        return prompt_R, np.array([len(response.token_ids) for response in self.responses])

    def as_record(self, step_seconds: float) -> dict[str, Any]:
        """Of metrics.jsonl."""
        responses = self.responses
        return {
            "num_sequences": len(responses),
            "mean_tokens": float(self.lengths[1].mean()),
            "ended_fraction": sum(response.ended for response in responses) / len(responses),
            "closed_fraction": sum(response.closed for response in responses) / len(responses),
            "num_without_label": self.num_without_label,
            "share_of_step": self.seconds / step_seconds,
        }


class Rollouts:
    """Samples responses in the place of the data's own."""

    def __init__(
        self,
        recipe: Recipe,
        loader: Loader,
        writer: Writer,
        tokenizer: PreTrainedTokenizerFast,
        layout: Layout,
        *,
        whole: bool,
    ) -> None:
        """whole: a partitioned model is gathered for as long as it samples."""
        section = recipe.rollout
        assert section is not None
        assert recipe.teacher is not None
        self.recipe, self._loader, self._examples = recipe, loader, loader.examples
        self._writer, self._tokenizer, self._layout = writer, tokenizer, layout
        self._whole = whole
        self._sampling = Sampling(section.max_new_tokens, section.temperature, section.top_p)
        self._end_ids = end_token_ids(writer.model, tokenizer)
        self._server: Server | None = None
        if section.server is not None:
            named = "teacher.model", recipe.teacher
            self._server = connect(section.server, *named, setting="rollout.server =")
        self.samples: list[tuple[int, SampledResponse]] = []  # (row from 0, response), last step's

    def of_step(self, step: int) -> tuple[list[Batch], RolloutFigures]:
        """This rank's micro-batches of sampled responses, as many as every other rank's.

        Collective: every rank must call this.
        """
        started = time.perf_counter()
        chosen = self._loader.rollouts(step)
        prompts = [self._examples.prompt_ids(int(i)) for i in chosen]
        seeds = [self._seed(step, number) for number in range(len(prompts))]
        share = self._ask(prompts, seeds) if self._server else self._generate(prompts, seeds)
        responses = gather_numbered(
            {number: self._response(prompts[number], ids) for number, ids in share.items()}
        )
        rows = [int(self._examples.row_N[i]) for i in chosen]
        self.samples = list(zip(rows, responses, strict=True))
        batches, num_without_label = self._batches()
        seconds = time.perf_counter() - started
        return batches, RolloutFigures(tuple(responses), num_without_label, seconds)

    def first_sample(self, step: int) -> dict[str, Any]:
        """Of the last step, which this was, counted from 1: what a person would look at."""
        row, response = self.samples[0]
        return {
            "step": step,
            "row": row + 1,
            "prompt": decode(self._tokenizer, response.prompt_ids.tolist()),
            "response": decode(self._tokenizer, response.token_ids),
            "num_tokens": len(response.token_ids),
            "ended": response.ended,
            "closed": response.closed,
        }

    def _generate(self, prompts: Sequence[IntArray], seeds: Sequence[int]) -> dict[int, list[int]]:
        """This rank's share, by number. Dealt as if all were as long as they may be."""
        room = np.array([len(ids) + self._sampling.max_new_tokens for ids in prompts])
        return generate_share(
            self._writer,
            self._deal(room),
            [ids.tolist() for ids in prompts],
            seeds,
            self._sampling,
            end_ids=self._end_ids,
            pad_id=self._loader.pad_token_id,
            whole=self._whole,
        )

    def _ask(self, prompts: Sequence[IntArray], seeds: Sequence[int]) -> dict[int, list[int]]:
        """This rank's share, by number, of a server, which batches what all ranks ask for. Raises
        UserError on every rank where one has no answer.
        """
        server, layout = self._server, self._layout
        assert server is not None

        def respond(number: int) -> list[int]:
            parameters = sampling_parameters(self._sampling, seeds[number], self._end_ids)
            choice = server.sample(prompts[number].tolist(), **parameters)
            if choice.get("token_ids") is None:
                raise UserError(
                    f"rollout.server = {server.url!r}: vLLM {server.version} returns no token "
                    "ids: use a later version"
                )
            token_ids: list[int] = choice["token_ids"]
            return token_ids

        numbers = range(layout.data_parallel_rank, len(prompts), layout.data_parallel_size)
        share, problem = {}, None
        try:
            share = dict(zip(numbers, in_parallel(respond, numbers), strict=True))
        except UserError as error:
            problem = str(error)
        for said in gather_objects(problem):
            if said is not None:
                raise UserError(said)
        return share

    def _response(self, prompt_ids: IntArray, token_ids: list[int]) -> SampledResponse:
        closing = self.recipe.data.think_close.strip()
        end_ids = set(self._end_ids)

        def text_of(ids: list[int]) -> str:
            return decode(self._tokenizer, ids)

        return sampled_response(prompt_ids, token_ids, text_of, closing, end_ids)

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
