"""The student's accuracy while it is trained, on problems of its own: no checkpoint is chosen by
those that the report counts.
"""

import numpy as np
from transformers import PreTrainedTokenizerFast

from kd.data.step_plan import BatchShape, deal
from kd.distributed.layout import Layout
from kd.distributed.process_group import gather_numbered, on_rank_zero
from kd.evaluate.problems import load_problems, render_prompts
from kd.evaluate.score import Summary, score
from kd.generation.sampling import as_response, end_token_ids, sampling_of
from kd.generation.tokens import generate_share
from kd.models.student import Student
from kd.recipe import Recipe


class Selection:
    """Problems dealt over the ranks, answered by the weights of now, and judged on rank 0."""

    def __init__(
        self,
        recipe: Recipe,
        student: Student,
        tokenizer: PreTrainedTokenizerFast,
        layout: Layout,
        *,
        whole: bool,
    ) -> None:
        """whole: a partitioned student is gathered for as long as it answers."""
        path, evaluation = recipe.training.selection_path, recipe.evaluation
        assert path is not None
        self._recipe, self._student, self._tokenizer = recipe, student, tokenizer
        self._whole = whole
        problems = load_problems("training.selection_path", path)
        self._answers = [problem.answer for problem in problems]
        prompts = render_prompts(tokenizer, problems, recipe.data)
        self._prompts: list[list[int]] = [
            tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts
        ]
        lengths = np.array([len(ids) for ids in self._prompts])
        shape = BatchShape(len(problems), evaluation.batch_size)
        dealt = deal(lengths, shape, layout.data_parallel_size)
        self._batches = dealt[layout.data_parallel_rank]

    def measure(self) -> Summary:
        """One response to each problem, greedy or sampled as [evaluation] says, the same draws
        every time. Collective: every rank must call this.
        """
        end_ids = end_token_ids(self._student.model, self._tokenizer)
        share = generate_share(
            self._student,
            self._batches,
            self._prompts,
            range(len(self._prompts)),
            sampling_of(self._recipe.evaluation, seed=0),
            end_ids=end_ids,
            pad_id=self._tokenizer.pad_token_id,
            whole=self._whole,
        )
        responses = [
            as_response(self._tokenizer, token_ids, set(end_ids))
            for token_ids in gather_numbered(share)
        ]
        evaluation, think_close = self._recipe.evaluation, self._recipe.data.think_close
        return on_rank_zero(lambda: score(responses, self._answers, evaluation, think_close)[1])
