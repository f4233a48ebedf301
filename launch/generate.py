"""Write reasoning traces of the recipe's teacher, as rows {"id", "prompt", "reasoning", "answer"}.

    python launch/generate.py --recipe NAME --problems FILE --output FILE [--temperature T]
    python launch/generate.py ... --num-samples 4 --keep correct --backend vllm --tensor-parallel 2
    deepspeed --num_gpus 8 launch/generate.py ...        # or torchrun, or srun: a share each
    python launch/generate.py ... --server http://HOST:8000      # vllm serve TEACHER, there

Samples as the recipe's [evaluation] says, unless a flag says otherwise. It may be killed at any
time: the same command, on as many ranks, continues after the last finished batch, and with
transformers gives the same file. Several samples of a problem have the ids PROBLEM/SAMPLE.
"""

import argparse
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd.cli import generation_arguments, recipe_parser, run
from kd.data.tokenizers import load_tokenizers
from kd.distributed.device import keep_gpus_of_rank
from kd.distributed.process_group import find_rank
from kd.errors import UserError
from kd.evaluate.problems import Problem, load_problems, make_requests
from kd.evaluate.score import score
from kd.generation.backends import Subject, batch_size_of, choose_backend, make_subject
from kd.generation.generator import weights_sha256
from kd.generation.journal import TraceFile, split_response
from kd.generation.sampling import Response, check_num_samples, sampling_of
from kd.generation.shares import check_num_batches, join_shares, open_share, share_name
from kd.logs import configure_logging
from kd.recipe import Recipe, load_recipe
from kd.runs.lock import hold, holding


def main() -> None:
    args = parse_args()
    rank, num_ranks, local_rank = find_rank()
    if num_ranks > 1:
        keep_gpus_of_rank(local_rank, args.tensor_parallel)
    configure_logging(rank)
    flags = ("temperature", "top_p", "max_new_tokens", "batch_size")
    given = [
        f"evaluation.{flag}={getattr(args, flag)}"
        for flag in flags
        if getattr(args, flag) is not None
    ]
    recipe = load_recipe(args.recipe, args.overrides + given)
    if recipe.teacher is None:
        raise UserError(f"recipe {args.recipe!r} has no [teacher] to generate with: add one")
    check_num_samples(args.num_samples, recipe.evaluation.temperature)
    is_judged = args.keep == "correct"
    problems = load_problems("--problems", args.problems, args.limit, need_answers=is_judged)
    sampling = sampling_of(recipe.evaluation, args.seed)
    backend = choose_backend(args.backend, args.server, args.tensor_parallel)
    num_requests = len(problems) * args.num_samples
    usual = batch_size_of(backend, recipe.evaluation, num_requests, num_ranks)
    batch_size = args.batch_size or usual
    check_num_batches(num_ranks, num_requests, batch_size, "set a lower --batch-size")
    tokenizer = load_tokenizers(recipe)
    subject = make_subject(
        "teacher", recipe.teacher, tokenizer, sampling, backend, field="teacher.model"
    )
    described = settings(recipe, subject, problems, args.num_samples, batch_size, args.keep)
    folder, name = args.output.parent, args.output.name
    hold(folder, f".{share_name(name, rank, num_ranks)}.lock")
    with holding(folder, f".{name}.lock"):  # no other rank joins meanwhile
        traces = open_share(args.output, described, rank, num_ranks)
    if not traces.complete:
        write_traces(recipe, subject, problems, args, batch_size, traces, rank, num_ranks)
    with holding(folder, f".{name}.lock"):
        whole = join_shares(args.output, described, num_ranks)
    if whole is None:
        print(
            f"rank {rank}: its share is done; the last rank to finish joins all shares", flush=True
        )
        return
    fates = ", ".join(f"{count} {fate}" for fate, count in sorted(whole.counts.items()))
    print(f"{args.output}: {fates}")


def parse_args(words: Sequence[str] | None = None) -> argparse.Namespace:
    """words: sys.argv unless given."""
    parser = recipe_parser(
        "Let the recipe's teacher solve problems, and write its reasoning traces."
    )
    parser.add_argument(
        "--problems",
        required=True,
        help="JSONL file of rows with prompt, "
        "answer (for --keep correct) and, if they have one, id",
    )
    parser.add_argument("--output", required=True, type=Path, help="JSONL file of traces")
    parser.add_argument(
        "--temperature",
        type=float,
        help="0: greedy; default: the recipe's evaluation.temperature",
    )
    parser.add_argument("--top-p", type=float, help="default: the recipe's evaluation.top_p")
    parser.add_argument(
        "--max-new-tokens", type=int, help="default: the recipe's evaluation.max_new_tokens"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        help="responses between two writes; default: the recipe's evaluation.batch_size, or 512 "
        "with vLLM",
    )
    parser.add_argument("--limit", type=int, help="only the first LIMIT problems")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the sampled responses (%(default)s)"
    )
    parser.add_argument(
        "--keep",
        choices=["ended", "closed", "correct"],
        default="ended",
        help="ended (the default): drop answers that --max-new-tokens cut off; closed: keep those "
        "too; correct: as ended, and drop answers that evaluation.judge finds wrong. A response "
        "whose thought is never closed is always dropped",
    )
    parser.add_argument(
        "--num-samples",
        type=int,
        default=1,
        metavar="K",
        help="responses per problem (%(default)s)",
    )
    generation_arguments(parser)
    parser.add_argument(
        "--local_rank",
        type=int,
        help="set by some launchers and ignored; LOCAL_RANK is read instead",
    )
    return parser.parse_args(words)


def settings(
    recipe: Recipe,
    subject: Subject,
    problems: Sequence[Problem],
    num_samples: int,
    batch_size: int,
    keep: str,
) -> dict[str, Any]:
    """All that the rows depend on, so that a file is not continued under other settings."""
    is_judged = keep == "correct"
    texts = "\n".join(
        f"{problem.id}\t{problem.prompt}" + (f"\t{problem.answer}" if is_judged else "")
        for problem in problems
    )
    rendering = ["system_prompt", "chat_template", "template_kwargs", "date", "end_token"]
    rendering += ["think_open", "think_close", "answer_open", "answer_close"]
    return {
        "teacher": subject.section.model,
        "revision": subject.section.revision,
        "weights_sha256": weights_sha256(subject.section.model),
        "problems_sha256": hashlib.sha256(texts.encode()).hexdigest(),
        "num_problems": len(problems),
        "num_samples": num_samples,
        **vars(subject.sampling),
        "backend": subject.backend.name,
        "batch_size": batch_size,
        "keep": keep,
        **({"judge": recipe.evaluation.judge} if is_judged else {}),
        **{key: getattr(recipe.data, key) for key in rendering},
    }


def write_traces(
    recipe: Recipe,
    subject: Subject,
    problems: Sequence[Problem],
    args: argparse.Namespace,
    batch_size: int,
    traces: TraceFile,
    rank: int,
    num_ranks: int,
) -> None:
    """Generate the missing batches of this rank's share, each of batch_size responses."""
    requests = make_requests(subject.tokenizer, problems, args.num_samples, recipe.data)
    num_batches = -(-len(requests) // batch_size)
    todo = range(num_batches)[rank::num_ranks][traces.num_batches :]
    for index in todo:
        numbers = range(len(requests))[index * batch_size : (index + 1) * batch_size]
        responses = subject.load()([requests[number] for number in numbers], index)
        asked = [problems[number // args.num_samples] for number in numbers]
        several = args.num_samples > 1
        ids = [requests[n].key if several else p.id for n, p in zip(numbers, asked, strict=True)]
        traces.append(*to_rows(asked, ids, responses, recipe, args.keep))
        print(f"batch {index + 1}/{num_batches}: {traces.counts['kept']} traces", flush=True)
    traces.finish()


def to_rows(
    problems: Sequence[Problem],
    ids: Sequence[str],
    responses: Sequence[Response],
    recipe: Recipe,
    keep: str,
) -> tuple[list[dict[str, str]], Counter[str]]:
    """The rows of the responses that can be split, and how many were kept or dropped, by reason.

    problems, ids: of each response. Of keep = "correct" the wrong ones are dropped too.
    """
    is_right = [True] * len(responses)
    if keep == "correct":
        answers = [problem.answer for problem in problems]
        verdicts, _ = score(responses, answers, recipe.evaluation, recipe.data.think_close)
        is_right = [verdict.correct for verdict in verdicts]
    rows: list[dict[str, str]] = []
    counts: Counter[str] = Counter()
    for problem, name, response, right in zip(problems, ids, responses, is_right, strict=True):
        parts = split_response(response, recipe.data, keep)
        if isinstance(parts, str) or not right:
            counts[parts if isinstance(parts, str) else "wrong"] += 1
            continue
        counts["kept"] += 1
        reasoning, answer = parts
        row = {"id": name, "prompt": problem.prompt, "reasoning": reasoning, "answer": answer}
        rows.append(row)
    return rows, counts


if __name__ == "__main__":
    run(main)
