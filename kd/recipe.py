"""A recipe is one frozen value: every fact of a run, read from TOML, checked, and printed before
anything starts.

`recipes/NAME.toml` names a base (`recipes/bases/BASE.toml`) and overrides what differs; `--set
section.key=value` overrides both. Loading a recipe touches no GPU, network or process group and
imports no torch, so that it can be checked on a login node. Facts of ZeRO and of precision live in
ds_configs/ and are not repeated here.

Relative paths of inputs (models, data, templates) are looked up in the current directory, then in
the repository, or where there is none in the installed package; run.output_dir is relative to the
current directory.
"""

import datetime
import difflib
import functools
import json
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from kd.constants import FORMAT_VERSION, LOGITS_GIB
from kd.errors import UserError
from kd.files import read_json, read_toml
from kd.names import shortened
from kd.ranges import (
    BatchSize,
    Beta,
    Filled,
    FolderName,
    Fraction,
    Magnitude,
    Minutes,
    NumProcesses,
    PathText,
    Positive,
    SamplingTemperature,
    Seconds,
    Seed,
    Temperature,
    Token,
    Weight,
    Whole,
    is_storable,
)

ROOT = Path(__file__).resolve().parents[1]
# A checkout has recipes/ and ds_configs/ next to kd; a wheel carries both inside of it (setup.cfg).
SHIPPED_DIR = ROOT if (ROOT / "recipes" / "bases").is_dir() else ROOT / "kd" / "_shipped"
RECIPES_DIR = SHIPPED_DIR / "recipes"
DS_CONFIGS_DIR = SHIPPED_DIR / "ds_configs"

Attention = Literal[
    "auto", "flash_attention_4", "flash_attention_3", "flash_attention_2", "sdpa", "eager"
]
SectionName = Literal["prompt", "cot", "answer"]
MIN_VALIDATIONS = 10  # of a run whose recipe says nothing of it
HUB_ID = re.compile(r"\w[\w.-]{0,95}(/[\w.-]{1,96})?", re.ASCII)

# What a chat template gets from a row, from its tokenizer and from data.date.
_OWN_NAMES_OF_TEMPLATES = {
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "strftime_now",
    "raise_exception",
    *("conversation", "chat_template", "tokenize", "tokenizer_kwargs", "return_dict"),
    *("padding", "truncation", "max_length", "return_tensors", "return_assistant_tokens_mask"),
    "sanitize_control_tokens",
}


def _iso_date(value: Any) -> Any:
    """TOML has dates of its own, without quotes."""
    text = value.isoformat() if isinstance(value, datetime.date) else value
    if not isinstance(text, str) or not re.fullmatch(r"\d{4}-\d\d-\d\d", text):
        raise ValueError("write a date as YYYY-MM-DD")
    datetime.date.fromisoformat(text)
    return text


def _template_variables(values: dict[str, JsonValue]) -> dict[str, JsonValue]:
    for name in values:
        if name in _OWN_NAMES_OF_TEMPLATES:
            raise ValueError(f"{name} is set by the program: leave it out")
        if not name.isidentifier():
            raise ValueError(
                f"{name!r} cannot be the name of a template variable: use letters, digits and _"
            )
    json.dumps(values, allow_nan=False)
    return values


IsoDate = Annotated[str, BeforeValidator(_iso_date)]
TemplateVariables = Annotated[dict[str, JsonValue], AfterValidator(_template_variables)]

SourceName = Literal[
    "local", "bespoke_stratos", "openthoughts", "sky_t1", "synthetic_1", "nemotron_math"
]
# What each source reads of a row, by the name that data.columns gives a column to.
SOURCE_FIELDS: dict[SourceName, tuple[str, ...]] = {
    "local": ("prompt", "reasoning", "answer", "messages", "conversations", "tools"),
    "bespoke_stratos": ("conversations", "tools"),
    "openthoughts": ("conversations", "tools"),
    "sky_t1": ("conversations", "tools"),
    "synthetic_1": ("task_type", "prompt", "llm_response"),
    "nemotron_math": ("input", "output"),
}


@dataclass(frozen=True)
class KeyFacts:
    """Facts about a recipe key, given in the key's annotation.

    in_token_key: it changes the tokens of a row, so it is part of the token cache's key. The
        contents of files and tokenizers are hashed there separately.
    may_change: it may differ between a run and its continuation, since it changes no weight.
    is_compared: runs that differ in it are not comparable, and a report lists the difference.
    is_axis: a study may vary it and a report plots results over it; a difference in it does not
        make runs incomparable.
    """

    in_token_key: bool = False
    may_change: bool = False
    is_compared: bool = True
    is_axis: bool = False


FIXED = KeyFacts()
TOKENS = KeyFacts(in_token_key=True)
FREE = KeyFacts(may_change=True)
PLACE = KeyFacts(may_change=True, is_compared=False)  # where and how, but not what
AXIS = KeyFacts(is_axis=True)


class RecipeSection(BaseModel):
    """Strict: a text or a bool is not accepted as a number, nor a float as an integer."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _arrays_are_tuples(cls, values: Any) -> Any:
        """TOML and JSON have lists, which could be changed."""
        if not isinstance(values, dict):
            return values
        return {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }

    @field_validator("*")
    @classmethod
    def _text_is_storable(cls, value: Any) -> Any:
        if not all(map(is_storable, value if isinstance(value, tuple) else (value,))):
            raise ValueError(
                "it holds a NUL or half of a surrogate pair, which cannot be written to a file"
            )
        return value


Divergence = Literal[
    "forward_kl", "reverse_kl", "mixed_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"
]


class RunSection(RecipeSection):
    name: Annotated[FolderName, PLACE] = Field(
        "", description="folder of the run inside output_dir; default: the recipe's name"
    )
    output_dir: Annotated[PathText, PLACE] = Field(
        "runs", description="folder that holds the folders of runs"
    )
    seed: Annotated[Seed, AXIS] = Field(
        0, description="seed of the order of rows, dropout, random weights and sampled responses"
    )
    log_seconds: Annotated[Seconds, PLACE] = Field(
        30.0,
        description="seconds between progress lines in a log, where no terminal shows a bar; "
        "0: a line for each step",
    )
    watchdog_minutes: Annotated[Minutes, PLACE] = Field(
        30.0,
        description="if no step ends for this long, every rank prints its stack and the run ends",
    )
    rendezvous_timeout_minutes: Annotated[Minutes, PLACE] = Field(
        20.0, description="how long the first ranks wait for the others to start"
    )
    collective_timeout_minutes: Annotated[Minutes, PLACE] = Field(
        120.0,
        description="how long a rank waits for another before the run ends; must exceed the "
        "longest normal wait, such as while one rank tokenises or reads a checkpoint",
    )


class ModelSection(RecipeSection):
    model: Annotated[PathText, FIXED] = Field(description="a local folder or a hub id")
    revision: Annotated[Filled | None, FIXED] = Field(
        None, description="branch, tag or commit on the hub; default: the main branch"
    )
    attention: Annotated[Attention, FIXED] = Field(
        "auto", description="auto: the best one that transformers reports as available"
    )
    trust_remote_code: Annotated[bool, FIXED] = Field(
        False, description="run the Python code that comes with the model"
    )


class TeacherSection(ModelSection):
    shard: Annotated[Literal["auto", "gpu", "node", "world"], FREE] = Field(
        "world",
        description="how the teacher is sharded: gpu, not at all (each GPU holds a whole copy); "
        "node, over the GPUs of a node (gathers never cross nodes); world, over all GPUs; auto, "
        "the fastest of these that fits, by the plan",
    )
    cache: Annotated[PathText | None, FIXED] = Field(
        None,
        description="a folder that launch/cache.py filled; used instead of the teacher, which is "
        "not loaded",
    )


class LoraSection(RecipeSection):
    """Adapters A and B for each frozen matrix W of target_modules: W + alpha / rank * B A
    (arXiv 2106.09685).
    """

    rank: Positive = Field(16, description="inner dimension of the two matrices of an adapter")
    alpha: Magnitude = Field(
        32.0, description="the product of the two matrices is scaled by alpha / rank"
    )
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="dropout on the input of each adapter"
    )
    target_modules: Literal["all-linear"] | Annotated[tuple[Filled, ...], Field(min_length=1)] = (
        Field(
            "all-linear",
            description="names of linear layers; all-linear is all of them except the lm_head",
        )
    )


class StudentSection(ModelSection):
    init: Annotated[Literal["pretrained", "random"], FIXED] = Field(
        "pretrained",
        description="random: new random weights of the shape in the model's config.json",
    )
    gradient_checkpointing: Annotated[bool | Literal["auto"], FIXED] = Field(
        True, description="auto: on only when the plan says that activations do not fit without it"
    )
    lora: Annotated[LoraSection | None, FIXED] = Field(
        None, description="a table [student.lora]: only adapters are trained"
    )
    freeze_head: Annotated[bool, FIXED] = Field(
        False, description="do not train the lm_head, nor the embeddings if they are tied to it"
    )
    freeze_embeddings: Annotated[bool, FIXED] = Field(
        False,
        description="do not train the input embeddings, nor the lm_head if they are tied to it",
    )

    @model_validator(mode="after")
    def _adapts_what_is_stored(self) -> "StudentSection":
        if self.lora is not None and self.init == "random":
            raise ValueError(
                'init = "random" with [student.lora]: adapters need a pretrained base that can be '
                'loaded again; set init = "pretrained" or remove [student.lora]'
            )
        return self

    @property
    def trains_layers(self) -> bool:
        """Whether the decoder layers' own weights are trained."""
        return self.lora is None

    @property
    def trains_head(self) -> bool:
        return self.lora is None and not self.freeze_head

    @property
    def trains_embeddings(self) -> bool:
        """Of a model whose head is another tensor."""
        return self.lora is None and not self.freeze_embeddings

    @property
    def checkpointing(self) -> bool:
        """gradient_checkpointing, once the plan has chosen."""
        return self.gradient_checkpointing is True


class SourceTable(RecipeSection):
    """One table of [[data.sources]]: the keys of [data] that may differ between sources, and how
    many rows to draw.
    """

    path: PathText | None = Field(None, description="as data.path")
    source: SourceName = Field("local", description="as data.source")
    revision: Filled | None = Field(None, description="as data.revision")
    columns: dict[str, str] = Field({}, description="as data.columns")
    weight: Magnitude | None = Field(
        None,
        description="share of the mixture, relative to the other weights; as many rows are drawn "
        "as these shares allow without drawing a row twice",
    )
    num_rows: Positive | None = Field(
        None, description="usable rows to draw; default, without a weight: all"
    )

    @model_validator(mode="after")
    def _is_one_source(self) -> "SourceTable":
        _check_source(self.source, self.path, self.columns)
        if self.weight is not None and self.num_rows is not None:
            raise ValueError("weight and num_rows exclude each other: remove one of them")
        return self

    @property
    def name(self) -> str:
        """As reports name it."""
        return self.path or self.source


def _check_source(source: SourceName, path: str | None, columns: dict[str, str]) -> None:
    if source == "local" and path is None:
        raise ValueError('source = "local" needs a path: name files of rows or a hub id')
    known = SOURCE_FIELDS[source]
    for name in columns.keys() - set(known):
        raise ValueError(
            f"columns.{name}: source {source!r} reads no such field; it reads {', '.join(known)}"
        )


class DataSection(RecipeSection):
    source: Annotated[SourceName, TOKENS] = Field(
        "local",
        description="local: your own columns; the others: the columns of a published data set",
    )
    path: Annotated[PathText | None, FIXED] = Field(
        None,
        description="local rows (a file, a folder or a glob; JSONL, also compressed, or Parquet) "
        "or a hub id; default: the hub id of the source",
    )
    revision: Annotated[Filled | None, FIXED] = Field(
        None, description="branch, tag or commit of a data set on the hub"
    )
    columns: Annotated[dict[str, str], TOKENS] = Field(
        {}, description='for each field of the source, the column that holds it: prompt = "problem"'
    )
    sources: Annotated[tuple[SourceTable, ...], FIXED] = Field(
        (),
        description="several sources instead of path, source, revision and columns: tables "
        "[[data.sources]] with these keys, and with a weight, num_rows or neither (all rows)",
    )
    validation_path: Annotated[PathText | None, FIXED] = Field(
        None,
        description="a local file, of which the first num_validation rows are used, or all if "
        "that is not set; default: rows are split off the training data",
    )
    num_train: Annotated[Positive | None, FIXED] = Field(
        None, description="training rows after filters; default: all"
    )
    num_validation: Annotated[Whole, FIXED] = Field(
        0, description="rows for validation; 0: none, unless validation_path is set"
    )
    split_seed: Annotated[Seed, FIXED] = Field(
        42, description="seed of the split into training and validation rows"
    )
    exclude_validation_prompts: Annotated[bool, FIXED] = Field(
        False, description="drop training rows that share their prompt with a validation row"
    )
    system_prompt: Annotated[str | None, TOKENS] = Field(
        None, description="replaces the system message of the rows; default: none is sent"
    )
    chat_template: Annotated[PathText | None, FIXED] = Field(
        None, description="a Jinja file; default: the teacher's template, or else the student's"
    )
    template_kwargs: Annotated[TemplateVariables, TOKENS] = Field(
        {}, description="a table of variables for the chat template, such as enable_thinking"
    )
    date: Annotated[IsoDate, TOKENS] = Field(
        "2024-07-26",  # the date that Llama 3's own templates fall back to
        description="the date that a chat template prints as today's; it is fixed so that the "
        "tokens do not change from day to day",
    )
    think_open: Annotated[str, TOKENS] = Field(
        "<think>\n", description="text before the chain of thought"
    )
    think_close: Annotated[Token, TOKENS] = Field(
        "\n</think>\n\n", description="text after the chain of thought"
    )
    answer_open: Annotated[str, TOKENS] = Field(
        "",
        description="text between think_close and the answer, if the teacher was trained with one",
    )
    answer_close: Annotated[str, TOKENS] = Field(
        "", description="text between the answer and the end token"
    )
    end_token: Annotated[Token | None, FIXED] = Field(
        None, description="token that ends the answer; default: eos of the student's tokenizer"
    )
    loss_sections: Annotated[tuple[SectionName, ...], Field(min_length=1), AXIS] = Field(
        ("prompt", "cot", "answer"), description="sections whose tokens are supervised"
    )
    random_mask_fraction: Annotated[float, Field(ge=0.0, lt=1.0), FIXED] = Field(
        0.0, description="fraction of the supervised tokens that lose their label, drawn at random"
    )
    on_bad_row: Annotated[Literal["drop", "error"], FIXED] = Field(
        "drop", description="what to do with a row that cannot be used, such as one with no answer"
    )
    num_proc: Annotated[NumProcesses, PLACE] = Field(1, description="processes that tokenise")
    cache_dir: Annotated[PathText, PLACE] = Field(
        "build/tokenized", description="folder of the tokenised data"
    )

    @property
    def tables(self) -> tuple[SourceTable, ...]:
        """The sources: those of [[data.sources]], or the one of [data] itself."""
        own = SourceTable.model_construct(
            path=self.path, source=self.source, revision=self.revision, columns=self.columns
        )
        return self.sources or (own,)

    @model_validator(mode="after")
    def _names_its_rows(self) -> "DataSection":
        if not self.sources:
            _check_source(self.source, self.path, self.columns)
        elif self.path is not None or self.source != "local" or self.revision or self.columns:
            raise ValueError(
                "[[data.sources]] replaces data.path, data.source, data.revision and "
                "data.columns: move these keys into its tables"
            )
        weighted = [table for table in self.sources if table.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            raise ValueError(
                "some of [[data.sources]] have a weight and others have none: give each of them a "
                "weight"
            )
        names = [table.name for table in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(
                f"[[data.sources]] names {max(names, key=names.count)!r} twice: remove one of the "
                "two"
            )
        if len(set(self.loss_sections)) != len(self.loss_sections):
            raise ValueError(
                f"loss_sections = {list(self.loss_sections)} names a section twice: remove one of "
                "the two"
            )
        return self


class TruncationSection(RecipeSection):
    keep_fraction: Annotated[
        float,
        Field(
            gt=0.0,
            le=1.0,
            description="fraction of each trace's tokens to keep, prompt included, rounded down",
        ),
        AXIS,
    ] = 1.0
    max_tokens: Annotated[Positive | None, AXIS] = Field(
        None, description="keep at most this many tokens, after keep_fraction"
    )
    window: Annotated[Literal["head", "middle", "tail"], AXIS] = Field(
        "head", description="which part of the trace is kept"
    )
    window_context: Annotated[Literal["drop", "keep"], AXIS] = Field(
        "drop", description="keep: tokens before the window are read but not supervised"
    )
    cut_after_think: Annotated[bool, FIXED] = Field(
        False,
        description="cut the trace after its chain of thought, before keep_fraction is applied",
    )
    max_full_tokens: Annotated[Positive | None, FIXED] = Field(
        None, description="drop examples that have more tokens than this before truncation"
    )


class LossSection(RecipeSection):
    divergence: Annotated[Divergence, FIXED] = Field(
        "forward_kl",
        description="divergence between the next-token distributions of teacher and student",
    )
    beta: Annotated[float, Field(gt=0.0, lt=1.0), FIXED] = Field(
        0.5, description="for jsd: the teacher's share of the mixture"
    )
    alpha: Annotated[float, Field(gt=0.0, lt=1.0), FIXED] = Field(
        0.1,
        description="for skew_kl and skew_reverse_kl: the first distribution's share of the "
        "mixture",
    )
    mix_weight: Annotated[Fraction, FIXED] = Field(
        0.5, description="for mixed_kl: the share of forward_kl; the rest is reverse_kl"
    )
    temperature: Annotated[Temperature, FIXED] = Field(
        1.0,
        description="divides the logits of both models in the divergence, but not in cross-entropy",
    )
    kd_weight: Annotated[Weight, FIXED] = Field(0.5, description="factor of the divergence")
    ce_weight: Annotated[Weight, FIXED] = Field(
        0.5, description="factor of cross-entropy with the data's own tokens"
    )
    chunk_size: Annotated[Positive | None, FIXED] = Field(
        None,
        description="tokens whose student logits exist at a time; default: as many as logits_gib "
        "allows",
    )
    logits_gib: Annotated[float, Field(gt=0.0, le=1024.0), FREE] = Field(
        LOGITS_GIB,
        description="memory for the logits of both models at a time, unless chunk_size is set; "
        "with more, the loss reads and writes the gradient of the head less often",
    )
    logits_dtype: Annotated[Literal["float32", "bfloat16"] | None, FIXED] = Field(
        None,
        description="dtype of logits and their gradient; default: float32; bfloat16 is less exact",
    )
    backend: Annotated[Literal["auto", "triton", "torch", "reference"], FIXED] = Field(
        "auto",
        description="auto: triton on CUDA, torch elsewhere; reference: full logits, for comparison",
    )

    @model_validator(mode="after")
    def _some_weight(self) -> "LossSection":
        if self.kd_weight == 0.0 and self.ce_weight == 0.0:
            raise ValueError(
                "kd_weight and ce_weight are both 0, so nothing would be learned: set one of them "
                "above 0"
            )
        return self


class RolloutSection(RecipeSection):
    """Responses that a model writes while the student is trained (arXiv 2306.13649), cut after a
    prefix (arXiv 2602.15260).
    """

    fraction: Annotated[float, Field(gt=0.0, le=1.0), FIXED] = Field(
        1.0, description="fraction of each global batch whose responses are sampled"
    )
    source: Annotated[Literal["student", "teacher"], FIXED] = Field(
        "student",
        description="who writes the responses: student is on-policy, teacher is sequence-level "
        "distillation",
    )
    max_new_tokens: Annotated[Positive, AXIS] = Field(
        512, description="most tokens to sample for each response; only these are learned from"
    )
    temperature: Annotated[Temperature, FIXED] = Field(
        1.0, description="temperature at which responses are sampled"
    )
    top_p: Annotated[float, Field(gt=0.0, le=1.0), FIXED] = Field(
        1.0, description="sample from the likeliest tokens whose probabilities add up to this"
    )
    samples_per_prompt: Annotated[Positive, FIXED] = Field(
        1, description="responses to each prompt of a global batch"
    )
    divergence: Annotated[Divergence | None, FIXED] = Field(
        None,
        description="divergence over sampled responses; default: reverse_kl if the student "
        "samples, loss.divergence if the teacher does",
    )
    gather: Annotated[Literal["auto", "whole", "layers"], FREE] = Field(
        "auto",
        description="how a model under ZeRO-3 is gathered for sampling: whole, all at once; "
        "layers, layer by layer for each token; auto, whole if it fits, by the plan",
    )
    server: Annotated[Filled | None, FREE] = Field(
        None, description="URL of a vLLM server that samples instead of the teacher on these ranks"
    )


class TrainingSection(RecipeSection):
    epochs: Annotated[Positive, FIXED] = Field(1, description="passes over the training rows")
    max_steps: Annotated[Positive | None, FIXED] = Field(
        None, description="optimizer steps; replaces epochs when set"
    )
    global_batch_size: Annotated[BatchSize, FIXED] = Field(
        8, description="sequences per optimizer step, over all ranks"
    )
    micro_batch_size: Annotated[BatchSize, FREE] = Field(
        1, description="sequences per rank and forward pass"
    )
    max_tokens_per_micro_batch: Annotated[Positive | None, FREE] = Field(
        None,
        description="limits a micro-batch by tokens instead of micro_batch_size; sequences are "
        "dealt so that ranks have about equal work",
    )
    sequence_layout: Annotated[Literal["auto", "padded", "packed"], FREE] = Field(
        "auto",
        description="packed: sequences follow each other without padding, and attention does not "
        "cross from one to the next; auto: packed if attention is flash attention",
    )
    learning_rate: Annotated[Magnitude, FIXED] = Field(
        1e-5, description="the highest learning rate of the schedule"
    )
    schedule: Annotated[Literal["one_cycle", "cosine", "constant"], FIXED] = Field(
        "cosine",
        description="after warm-up: cosine falls to 0, constant stays; one_cycle is OneCycleLR",
    )
    warmup_fraction: Annotated[Fraction, FIXED] = Field(
        0.1, description="fraction of all steps in which the learning rate rises"
    )
    weight_decay: Annotated[Weight, FIXED] = Field(0.0, description="weight decay of AdamW")
    adam_betas: Annotated[tuple[Beta, Beta], FIXED] = Field(
        (0.9, 0.999), description="betas of AdamW"
    )
    adam_eps: Annotated[Magnitude, FIXED] = Field(1e-8, description="epsilon of AdamW")
    max_grad_norm: Annotated[Magnitude, FIXED] = Field(
        1.0, description="gradients with a larger norm are scaled down to it"
    )
    skip_nonfinite: Annotated[Whole, FREE] = Field(
        0,
        description="how many steps with a loss or gradient that is not finite to skip before the "
        "run stops",
    )
    checkpoint_every: Annotated[Positive, FREE] = Field(
        500, description="steps between checkpoints"
    )
    validate_every: Annotated[Positive | None, FREE] = Field(
        None,
        description="steps between validations; default: at least ten in a run, and after each "
        "saved step. The best step is one that is both validated and saved",
    )
    evaluate_every: Annotated[Positive | None, FREE] = Field(
        None,
        description="steps between measurements of the student's accuracy on selection_path; it is "
        "measured at each saved step too; default: none",
    )
    selection_path: Annotated[PathText | None, FREE] = Field(
        None, description="a local JSONL of problems for evaluate_every, other than evaluation.path"
    )
    select_best: Annotated[Literal["val_loss", "accuracy"], FREE] = Field(
        "val_loss", description="what decides which saved step is exported as the best"
    )
    keep_last: Annotated[Positive, FREE] = Field(
        2, description="checkpoints to keep, not counting the best one"
    )

    def saves_after(self, step: int, total_steps: int) -> bool:
        """Whether a run of total_steps is saved after `step`, counted from 1."""
        return step % self.checkpoint_every == 0 or step == total_steps

    def validates_after(self, step: int, total_steps: int) -> bool:
        """Whether a run of total_steps is validated after `step`, counted from 1."""
        if self.validate_every is not None:
            return step % self.validate_every == 0 or step == total_steps
        every = max(total_steps // MIN_VALIDATIONS, 1)
        return step % every == 0 or self.saves_after(step, total_steps)

    def evaluates_after(self, step: int, total_steps: int) -> bool:
        """Whether accuracy is measured after `step`, counted from 1, of a run of total_steps."""
        every = self.evaluate_every
        return every is not None and (step % every == 0 or self.saves_after(step, total_steps))


class EvaluationSection(RecipeSection):
    path: Annotated[PathText | None, PLACE] = Field(
        None, description="a local JSONL of problems, with prompt and answer"
    )
    tasks: Annotated[tuple[str, ...], PLACE] = Field(
        (), description="names of public benchmarks in kd/evaluate/tasks.py"
    )
    judge: Annotated[Literal["math", "exact"], PLACE] = Field(
        "math", description="compare answers as mathematics (math) or as text (exact)"
    )
    max_new_tokens: Annotated[Positive, PLACE] = Field(
        32768, description="most tokens of a response"
    )
    temperature: Annotated[SamplingTemperature, PLACE] = Field(
        0.6, description="temperature of sampling; 0: greedy"
    )
    top_p: Annotated[float, Field(gt=0.0, le=1.0), PLACE] = Field(
        0.95, description="sample from the likeliest tokens whose probabilities add up to this"
    )
    batch_size: Annotated[BatchSize, PLACE] = Field(
        16, description="responses to generate at a time"
    )


class MonitorSection(RecipeSection):
    tensorboard: Annotated[bool, PLACE] = Field(
        False, description="write the metrics to monitor/ for TensorBoard"
    )
    csv: Annotated[bool, PLACE] = Field(
        False, description="write the metrics to monitor/scalars.csv"
    )
    wandb_project: Annotated[Filled | None, PLACE] = Field(
        None, description="send the metrics to this project of Weights & Biases"
    )


class DeepSpeedSection(RecipeSection):
    student: Annotated[PathText, FIXED] = Field(
        "zero3_bf16.json",
        description="a file in ds_configs/, or a path; auto: the fastest of zero1_bf16, "
        "zero2_bf16, zero3_bf16 and zero3_bf16_offload.json that fits, by the plan",
    )
    teacher: Annotated[PathText, FIXED] = Field(
        "zero3_teacher.json",
        description="a file in ds_configs/, or a path",
    )


class Recipe(RecipeSection):
    run: RunSection = RunSection()
    teacher: TeacherSection | None = Field(
        None,
        description="Without this section a run is plain fine-tuning, and loss.kd_weight must be 0",
    )
    student: StudentSection
    data: DataSection
    truncation: TruncationSection = TruncationSection()
    loss: LossSection = LossSection()
    rollout: RolloutSection | None = Field(
        None, description="Without this section all responses come from the data"
    )
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    monitor: MonitorSection = MonitorSection()
    deepspeed: DeepSpeedSection = DeepSpeedSection()

    @model_validator(mode="after")
    def _sections_agree(self) -> "Recipe":
        if self.teacher is None and self.loss.kd_weight > 0:
            raise ValueError(
                "loss.kd_weight > 0 needs a [teacher]: name one, or set loss.kd_weight = 0"
            )
        if self.teacher is not None and self.teacher.cache is not None:
            _check_reads_prefixes(self.truncation)
        if self.teacher is not None and self.loss.kd_weight == 0:
            raise ValueError(
                "loss.kd_weight = 0 never uses the [teacher]: remove the section, or raise "
                "loss.kd_weight"
            )
        if self.rollout is not None:
            _check_rollout(self, self.rollout)
        _check_selection(self)
        return self

    def with_values(self, values: Mapping[str, Any]) -> "Recipe":
        """The recipe with other values: {"section.key": value}, or "section.table.key". Code
        changes a recipe in no other way.

        Raises UserError for an unknown key and for a value that is not valid.
        """
        sections = self.model_dump()
        for name, value in values.items():
            layer, is_entry = _nested(name, value), name.count(".") > 1
            _check_keys(f"{name} = {shortened(value)}", layer)
            for section, changed in layer.items():
                below = sections[section] or {}
                sections[section] = _merge(below, changed) if is_entry else {**below, **changed}
        try:
            return Recipe.model_validate(sections)
        except ValidationError as error:
            changes = ", ".join(f"{name} = {shortened(value)}" for name, value in values.items())
            raise UserError(_describe(error, [(changes, sections)])) from None

    def as_file(self) -> dict[str, Any]:
        """What recipe.json holds; load_recipe reads it back."""
        return {"format_version": FORMAT_VERSION, **self.model_dump(mode="json")}

    @property
    def autos(self) -> tuple[str, ...]:
        """ "section.key" of each value that the plan is to choose (kd.plan.placement)."""
        found = {
            "teacher.shard": self.teacher and self.teacher.shard,
            "deepspeed.student": self.deepspeed.student,
            "student.gradient_checkpointing": self.student.gradient_checkpointing,
        }
        return tuple(name for name, value in found.items() if value == "auto")

    @property
    def run_dir(self) -> Path:
        return Path(self.run.output_dir) / self.run.name

    @property
    def num_rollouts(self) -> int:
        """Sequences of a global batch whose responses are sampled."""
        if self.rollout is None:
            return 0
        return round(self.rollout.fraction * self.training.global_batch_size)

    @property
    def rollout_loss(self) -> LossSection:
        """The loss over sampled responses. Those of the student get no cross-entropy, since they
        are not text to imitate.
        """
        assert self.rollout is not None
        of_student = self.rollout.source == "student"
        changes: dict[str, Any] = {"ce_weight": 0.0} if of_student else {}
        usual = "reverse_kl" if of_student else self.loss.divergence
        changes["divergence"] = self.rollout.divergence or usual
        return self.loss.model_copy(update=changes)

    def max_micro_batches(self, world_size: int) -> int:
        """The most micro-batches of a rank in an optimizer step, for DeepSpeed's
        gradient_accumulation_steps. With a budget of tokens, where steps differ, 2 means "more
        than one" and 1 means "one".
        """
        training, num_rollouts = self.training, self.num_rollouts
        parts = [n for n in (training.global_batch_size - num_rollouts, num_rollouts) if n]
        if training.max_tokens_per_micro_batch is not None:
            return min(sum(-(-n // world_size) for n in parts), 2)
        return sum(-(-n // (world_size * training.micro_batch_size)) for n in parts)


def _check_selection(recipe: Recipe) -> None:
    training, path = recipe.training, recipe.training.selection_path
    if training.evaluate_every is not None and path is None:
        raise ValueError(
            f"training.evaluate_every = {training.evaluate_every} needs problems: set "
            "training.selection_path"
        )
    if path is not None and path == recipe.evaluation.path:
        raise ValueError(
            f"training.selection_path = {path!r} is evaluation.path too: choosing a checkpoint by "
            "the problems of the report inflates its score; name other problems"
        )
    if training.select_best == "accuracy" and training.evaluate_every is None:
        raise ValueError(
            'training.select_best = "accuracy" needs accuracy to be measured: set '
            "training.evaluate_every"
        )


def _check_rollout(recipe: Recipe, rollout: RolloutSection) -> None:
    if recipe.teacher is None:
        raise ValueError("[rollout] needs a [teacher] to learn from: name one")
    if recipe.teacher.cache is not None:
        raise ValueError(
            f'[rollout] with teacher.cache = "{recipe.teacher.cache}": a cache does not cover '
            "responses that are sampled later; remove one of the two"
        )
    if rollout.server is not None and rollout.source != "teacher":
        raise ValueError(
            f'rollout.server = "{rollout.server}" with rollout.source = "{rollout.source}": a '
            "server keeps the weights that it was started with, but the student's change; set "
            'rollout.source = "teacher", or remove rollout.server'
        )
    size, num, per_prompt = (
        recipe.training.global_batch_size,
        recipe.num_rollouts,
        rollout.samples_per_prompt,
    )
    if not num or num % per_prompt:
        raise ValueError(
            f"rollout.fraction = {rollout.fraction} of training.global_batch_size = {size} is "
            f"{num} sequences, and rollout.samples_per_prompt = {per_prompt} does not divide that "
            "number: change one of the three"
        )
    if not {"cot", "answer"} & set(recipe.data.loss_sections):
        raise ValueError(
            "[rollout] samples chains of thought and answers, but data.loss_sections has neither: "
            'add "cot" or "answer"'
        )


def _check_reads_prefixes(truncation: TruncationSection) -> None:
    """What a teacher's cache can serve: the states of a whole trace are those of its beginnings."""
    if truncation.window != "head" and truncation.window_context == "drop":
        raise ValueError(
            f'truncation.window = "{truncation.window}" with window_context = "drop" does not '
            "read a trace from its start, but the targets in teacher.cache come from a teacher "
            'that did: set truncation.window_context = "keep", or remove teacher.cache'
        )


def key_facts() -> dict[str, KeyFacts]:
    """{"section.key": its facts} for every key. Raises TypeError for a key without facts."""
    found = {}
    for section in Recipe.model_fields:
        for key, field in _section_model(section).model_fields.items():
            facts = [entry for entry in field.metadata if isinstance(entry, KeyFacts)]
            if len(facts) != 1:
                raise TypeError(f"{section}.{key} states {len(facts)} KeyFacts in its annotation")
            found[f"{section}.{key}"] = facts[0]
    return found


@functools.cache
def facts_of(name: str) -> KeyFacts:
    """The facts of "section.key", which another version may have written. An unknown key has the
    facts of its section if all keys of that section share them, and is FIXED otherwise.
    """
    known, (section, _, _) = key_facts(), name.partition(".")
    siblings = {facts for key, facts in known.items() if key.startswith(f"{section}.")}
    return known.get(name) or (siblings.pop() if len(siblings) == 1 else FIXED)


def default_of(name: str) -> Any:
    """The value that a recipe file without "section.key" has there, as JSON; None for a key that is
    required or not known.
    """
    section, _, key = name.partition(".")
    field = (
        _section_model(section).model_fields.get(key) if section in Recipe.model_fields else None
    )
    if field is None or field.is_required():
        return None
    default = field.get_default(call_default_factory=True)
    return list(default) if isinstance(default, tuple) else default


def check_format_version(path: Path, content: Mapping[str, Any]) -> None:
    """Raise UserError for a file that a later version wrote. A file without a version is 1."""
    version = content.get("format_version", 1)
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version = {shortened(version)}, but this version reads only 1 to "
            f"{FORMAT_VERSION}: use the version that wrote it, or a later one"
        )


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """Resolve a recipe by name (recipes/NAME.toml, a base among them) or by path, with
    `section.key=value` overrides.

    A path may also name the resolved recipe of a run, runs/NAME/recipe.json.

    Raises UserError that names the file, the key or value, and the nearest valid name.
    """
    layers = list(_layers(find_recipe(name)))
    layers += [(f"--set {_cut(text)}", _parse_override(text)) for text in overrides]
    merged: dict[str, Any] = {}
    for where, layer in layers:
        _check_keys(where, layer)
        for section, values in layer.items():
            merged[section] = _merge(merged.get(section, {}), values)
    run = merged.setdefault("run", {})
    if run.get("name", "") == "":
        run["name"] = Path(name).stem
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        raise UserError(_describe(error, layers)) from None


def find_recipe(name: str) -> Path:
    """The file of a recipe's name or path. Raises UserError with the nearest names when there is
    none.
    """
    if name.endswith((".toml", ".json")):
        if os.path.isfile(name):
            return Path(name)
        raise UserError(
            f"recipe {shortened(name)}: no such file; check the path, or use a name from recipes/"
        )
    for folder in (RECIPES_DIR, RECIPES_DIR / "bases"):
        path = folder / f"{name}.toml"
        if os.path.isfile(path):
            return path
    known = sorted(path.stem for path in RECIPES_DIR.glob("*.toml"))
    raise UserError(
        f"recipe {shortened(name)} is not in recipes/.{_nearest(name, known)}\n"
        f"The recipes are {', '.join(known)}"
    )


def find_input(value: str) -> Path | None:
    """The local file or folder that a recipe's value names, or None when there is none and it may
    be a hub id.
    """
    for folder in (Path(), SHIPPED_DIR):
        path = folder / os.path.expanduser(value)
        if os.path.exists(path):  # False, as Path.exists is not, for a name that is too long
            return path
    return None


def is_hub_id(value: str) -> bool:
    """Whether a value has the form `name` or `owner/name`, so that it may be looked up on the
    hub.
    """
    suffixes = (".jsonl", ".json", ".parquet", ".gz", ".zst")
    return HUB_ID.fullmatch(value) is not None and not value.endswith(suffixes)


def _layers(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file, content) of a recipe's base, when it names one, and of the recipe itself."""
    member = _read_resolved(path) if path.suffix == ".json" else read_toml(path)
    base = member.pop("base", None)
    if base is not None:
        base_path = RECIPES_DIR / "bases" / f"{base}.toml"
        if not isinstance(base, str) or not os.path.isfile(base_path):
            known = sorted(p.stem for p in (RECIPES_DIR / "bases").glob("*.toml"))
            raise UserError(
                f"{path}: base = {shortened(base)} is not in recipes/bases/."
                f"{_nearest(str(base), known)}"
            )
        yield str(base_path), read_toml(base_path)
    yield str(path), member


def _read_resolved(path: Path) -> dict[str, Any]:
    sections = read_json(path)
    if not isinstance(sections, dict):
        raise UserError(
            f"{path}: it holds {shortened(sections)} and no recipe: name the recipe.json of a run"
        )
    check_format_version(path, sections)
    return {
        name: values
        for name, values in sections.items()
        if values is not None and name != "format_version"
    }


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    section, _, field = key.strip().partition(".")
    if not (equals and section and field.partition(".")[0]):
        raise UserError(
            f"--set {_cut(text)}: write section.key=value, as in --set training.max_steps=10"
        )
    try:
        parsed = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        parsed = {"value": value}  # a bare word is a string: --set run.name=trial
    if len(parsed) > 1:
        raise UserError(
            f"--set {_cut(text)}: it holds {len(parsed)} values: write one --set for each"
        )
    return _nested(key.strip(), parsed["value"])


def _nested(name: str, value: Any) -> dict[str, Any]:
    """{section: {key: value}} of "section.key", and of a table's entry, "section.key.entry", as
    data.template_kwargs.enable_thinking, {section: {key: {entry: value}}}.
    """
    section, _, field = name.partition(".")
    key, _, entry = field.partition(".")
    return {section: {key: {entry: value} if entry else value}}


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Keys of `above` replace those of `below`; tables are merged key by key."""
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            merged[key] = {**below[key], **above[key]}
    return merged


def _check_keys(where: str, layer: dict[str, Any]) -> None:
    sections = Recipe.model_fields
    for section, values in layer.items():
        if section not in sections:
            near = _nearest(section, sections)
            raise UserError(f"{where}: unknown section [{_cut(section)}].{near}")
        if not isinstance(values, dict):
            raise UserError(
                f"{where}: {section} is a section: write [{section}] and put its keys below it"
            )
        _check_names(where, section, values, _section_model(section))


def _check_names(
    where: str, prefix: str, values: dict[str, Any], model: type[RecipeSection]
) -> None:
    fields, tables = model.model_fields, _tables(model)
    for key, value in values.items():
        if key not in fields:
            near = _nearest(key, fields)
            raise UserError(f"{where}: unknown key {prefix}.{_cut(key)}.{near}")
        if key in tables and isinstance(value, dict):
            _check_names(where, f"{prefix}.{key}", value, tables[key])


def _section_model(section: str) -> type[RecipeSection]:
    optional = {"teacher": TeacherSection, "rollout": RolloutSection}
    return optional.get(section) or Recipe.model_fields[section].annotation  # type: ignore[return-value]


def _tables(model: type[RecipeSection]) -> dict[str, type[RecipeSection]]:
    """The keys of a section that are tables of keys of their own, as student.lora."""
    kinds = {
        key: (field.annotation, *get_args(field.annotation))
        for key, field in model.model_fields.items()
    }
    return {
        key: kind
        for key, of_key in kinds.items()
        for kind in of_key
        if isinstance(kind, type) and issubclass(kind, RecipeSection)
    }


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name[:200], list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _describe(error: ValidationError, layers: list[tuple[str, dict[str, Any]]]) -> str:
    """One line per problem: the file that set the value, the key, the value, and what is
    expected.
    """
    lines = []
    for problem in error.errors():
        section, key = (*map(str, problem["loc"]), "", "")[:2]
        where = [file for file, layer in layers if key in (layer.get(section) or {})] or [
            layers[-1][0]
        ]
        is_of_table = section in Recipe.model_fields and key in _tables(_section_model(section))
        field = ".".join(map(str, problem["loc"][: 3 if is_of_table else 2]))
        value = f" = {shortened(problem['input'])}" if key and problem["type"] != "missing" else ""
        what = problem["msg"].removeprefix("Value error, ")
        lines.append(f"{where[-1]}: {field}{value}{': ' if field else ''}{what}")
    return "\n".join(lines)
