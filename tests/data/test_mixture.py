"""Several sources in one recipe: how many rows of each, which, and what is reported of each."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_samples import good_rows, write_jsonl
from tiny import layout_of
from transformers import PreTrainedTokenizerFast

from kd.data.dataset import Data, load_data
from kd.data.loader import Loader
from kd.data.regions import NUM_REGIONS
from kd.data.step_plan import BatchShape
from kd.errors import UserError
from kd.losses import RowDiagnostics
from kd.recipe import Recipe, load_recipe
from kd.runs.check import check_recipe, inputs
from kd.training.diagnostics import region_sums, summarise

Mix = Callable[..., Data]


@pytest.fixture
def tables(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """tables({"num": 12, "weight": 1.0}, ...): [[data.sources]] of so many rows each."""

    def build(*sources: dict[str, Any]) -> list[dict[str, Any]]:
        found = []
        for i, source in enumerate(sources):
            path = tmp_path / f"source_{i}.jsonl"
            rows = [row | {"prompt": f"{i}: {row['prompt']}"} for row in good_rows(source["num"])]
            write_jsonl(path, rows)
            found.append({"path": str(path)} | {k: v for k, v in source.items() if k != "num"})
        return found

    return build


@pytest.fixture
def mix(recipe: Callable[..., Recipe], tables: Any, tiny: PreTrainedTokenizerFast) -> Mix:
    def build(*sources: dict[str, Any], **data: Any) -> Data:
        return load_data(recipe(data={"path": None, "sources": tables(*sources)} | data), tiny)

    return build


def counts(data: Data) -> list[int]:
    found = Counter(data.train.source_N.tolist())
    if data.validation is not None:
        found += Counter(data.validation.source_N.tolist())
    return [found[i] for i in range(data.train.num_sources)]


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ([{"num": 12}, {"num": 5}], [12, 5]),
        ([{"num": 12, "num_rows": 4}, {"num": 5}], [4, 5]),
        ([{"num": 12, "weight": 1.0}, {"num": 5, "weight": 1.0}], [5, 5]),
        ([{"num": 12, "weight": 3.0}, {"num": 5, "weight": 1.0}], [12, 4]),
        ([{"num": 10, "weight": 0.7}, {"num": 10, "weight": 0.3}], [10, 4]),
        ([{"num": 6, "weight": 2e-9}, {"num": 9, "weight": 3e-9}], [6, 9]),
        ([{"num": 7, "weight": 5.0}], [7]),
    ],
    ids=str,
)
def test_each_source_has_its_rows_and_none_twice(
    mix: Mix, sources: list[dict[str, Any]], expected: list[int]
) -> None:
    data = mix(*sources)
    assert counts(data) == expected
    assert len(set(data.train.row_N.tolist())) == len(data.train)


def test_the_mixture_is_drawn_by_split_seed_and_split_like_one_file(mix: Mix) -> None:
    sources = ({"num": 12, "num_rows": 8}, {"num": 9, "num_rows": 6})
    one, again = mix(*sources, num_validation=4), mix(*sources, num_validation=4)
    other = mix(*sources, num_validation=4, split_seed=7)
    assert one.train.row_N.tolist() == again.train.row_N.tolist()
    assert sorted(one.train.row_N) != sorted(other.train.row_N)
    assert counts(one) == counts(other) == [8, 6]
    assert one.validation is not None
    assert not set(one.train.row_N) & set(one.validation.row_N)
    assert set(one.validation.source_N.tolist()) == {0, 1}


def test_rows_keep_the_tokens_of_their_source(
    mix: Mix, recipe: Callable[..., Recipe], tmp_path: Path, tiny: PreTrainedTokenizerFast
) -> None:
    data = mix({"num": 12, "num_rows": 8}, {"num": 9})
    alone = load_data(recipe(data={"path": str(tmp_path / "source_1.jsonl")}), tiny).train
    expected = {alone[i].row: alone[i].input_ids.tolist() for i in range(len(alone))}
    for i in np.flatnonzero(data.train.source_N == 1):
        example = data.train[int(i)]
        assert example.source == 1
        assert example.input_ids.tolist() == expected[example.row - 12]


def test_columns_are_those_of_each_source(
    recipe: Callable[..., Recipe], tables: Any, tmp_path: Path, tiny: PreTrainedTokenizerFast
) -> None:
    named = tables({"num": 4})
    rows = [
        {"problem": r["prompt"], **{k: r[k] for k in ("reasoning", "answer")}} for r in good_rows(3)
    ]
    write_jsonl(tmp_path / "problems.jsonl", rows)
    other = {"path": str(tmp_path / "problems.jsonl"), "columns": {"prompt": "problem"}}
    data = load_data(recipe(data={"path": None, "sources": [*named, other]}), tiny)
    assert counts(data) == [4, 3]


def test_the_report_tells_sources_apart(mix: Mix, tmp_path: Path) -> None:
    data = mix({"num": 12, "num_rows": 8}, {"num": 9}, num_validation=3)
    report = data.report
    names = [str(tmp_path / f"source_{i}.jsonl") for i in range(2)]
    assert list(report.train.by_source) == names
    parts = report.train.by_source.values()
    assert sum(part.num_examples for part in parts) == report.train.num_examples == 14
    assert sum(part.num_supervised_tokens for part in parts) == report.train.num_supervised_tokens
    assert f"  {names[1]}: " in str(report)
    assert "  drawn for the mixture: 8" in str(report)
    assert load_single(mix).report.train.by_source == {}


def load_single(mix: Mix) -> Data:
    return mix({"num": 5})


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_regions_of_a_batch_say_of_which_source_they_are(mix: Mix, num_ranks: int) -> None:
    data = mix({"num": 12}, {"num": 9})
    loader = Loader(data.train, BatchShape(8, 2), seed=0, pad_token_id=0)
    for rank in range(num_ranks):
        for batch in loader.micro_batches(0, layout_of(rank, num_ranks)):
            assert batch.num_sources == 2
            sources = [int(place.row >= 12) for place in batch.places]
            assert set((batch.region_index // NUM_REGIONS).tolist()) == set(sources)


def test_diagnostics_tell_sources_apart_and_together_are_what_they_were() -> None:
    rows = torch.arange(len(RowDiagnostics._fields) * 6, dtype=torch.float64).view(-1, 6)
    regions = torch.tensor([0, 3, 9, 0, 3, 9])
    source = torch.tensor([0, 0, 0, 1, 1, 2])
    apart = summarise(region_sums(rows, source * NUM_REGIONS + regions, 4).tolist())
    together = summarise(region_sums(rows, regions).tolist())
    assert apart is not None
    by_source = apart.pop("by_source")
    assert apart == together
    assert [part and part["num_supervised_tokens"] for part in by_source] == [3, 2, 1, None]
    assert by_source[2]["forward_kl"] == 5.0


BAD: list[tuple[list[dict[str, Any]], dict[str, Any], str]] = [
    ([{"num": 3, "num_rows": 4}], {}, r"data\.sources\[0\]\.num_rows = 4: .* has 3 usable rows"),
    ([{"num": 3, "weight": 1.0}, {"num": 3}], {}, "give each of them a weight"),
    ([{"num": 3, "weight": 1.0, "num_rows": 2}], {}, "weight and num_rows exclude each other"),
    ([{"num": 3, "weight": 0.0}], {}, "weight"),
    ([{"num": 3, "weight": -1.0}], {}, "weight"),
    ([{"num": 3, "weight": True}], {}, "weight"),
    ([{"num": 3, "num_rows": 0}], {}, "num_rows"),
    ([{"num": 3, "wieght": 1.0}], {}, "wieght"),
    ([{"num": 3, "source": "nobody"}], {}, "source"),
    ([{"num": 3, "columns": {"question": "q"}}], {}, r"columns\.question"),
    ([{"num": 3}], {"path": "rows.jsonl"}, r"replaces data\.path"),
    ([{"num": 3}], {"columns": {"prompt": "p"}}, r"replaces .* data\.columns"),
    ([{"num": 3, "weight": 1.0}, {"num": 3, "weight": 1e-9}], {}, "less than one row"),
]


@pytest.mark.parametrize(("sources", "data", "message"), BAD, ids=[bad[2] for bad in BAD])
def test_what_is_no_mixture_is_refused(
    mix: Mix, sources: list[dict[str, Any]], data: dict[str, Any], message: str
) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        mix(*sources, **data)


def test_one_source_cannot_be_named_twice(recipe: Callable[..., Recipe], tables: Any) -> None:
    (table,) = tables({"num": 3})
    with pytest.raises(ValueError, match="twice"):
        recipe(data={"path": None, "sources": [table, table]})


def test_a_recipe_in_toml_and_the_run_s_own_json_name_the_same_sources(
    tables: Any, tmp_path: Path
) -> None:
    one, two = tables({"num": 3}, {"num": 4})
    toml = tmp_path / "mixed.toml"
    toml.write_text(
        f"""[student]
model = "{tmp_path}"
[loss]
kd_weight = 0.0
[[data.sources]]
path = "{one["path"]}"
weight = 0.5
[[data.sources]]
path = "{two["path"]}"
weight = 1
columns.prompt = "problem"
"""
    )
    recipe = load_recipe(str(toml))
    assert [table.weight for table in recipe.data.sources] == [0.5, 1.0]
    assert recipe.data.sources[1].columns == {"prompt": "problem"}
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    assert load_recipe(str(tmp_path / "recipe.json")).data == recipe.data
    assert inputs(recipe)["data.sources[1].path"] == two["path"]
    Path(two["path"]).unlink()
    with pytest.raises(UserError, match=r"data\.sources\[1\]\.path = "):
        check_recipe(recipe)
