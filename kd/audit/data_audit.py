"""What a recipe's truncation keeps and drops of its examples, before a GPU hour is spent."""

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from kd.audit.counts import TokenCounts, TraceLengths, count_tokens, measure_lengths
from kd.audit.findings import Found, find_in_traces
from kd.constants import FORMAT_VERSION
from kd.data.account import DataReport
from kd.data.dataset import Data
from kd.recipe import Recipe


@dataclass(frozen=True)
class Audit:
    """Of the training examples; what the filters did to all rows is in `report`."""

    recipe: Recipe
    report: DataReport
    tokens: dict[str, TokenCounts]  # by section, and "total"
    lengths: TraceLengths
    found: dict[str, Found]  # by the fields of kd.audit.findings.Findings

    def to_json(self) -> dict[str, Any]:
        data, truncation = self.recipe.data, self.recipe.truncation
        return {
            "format_version": FORMAT_VERSION,
            "recipe": self.recipe.run.name,
            "truncation": truncation.model_dump(mode="json"),
            "data": data.model_dump(mode="json"),
            "report": asdict(self.report),
            "tokens": {name: asdict(counts) for name, counts in self.tokens.items()},
            "lengths": asdict(self.lengths),
            "found": {name: asdict(found) for name, found in self.found.items()},
        }


def audit_data(recipe: Recipe, data: Data, tokenizer: PreTrainedTokenizerFast) -> Audit:
    """`data` is load_data's of this recipe and tokenizer. Seconds for 100,000 rows of tokens, more
    for their text.
    """
    train = data.train
    return Audit(
        recipe,
        data.report,
        count_tokens(train),
        measure_lengths(train),
        find_in_traces(train, tokenizer),
    )
