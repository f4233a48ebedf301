"""Shards of a cache: what is read is what was written, and what was changed is found."""

import json
from pathlib import Path

import pytest
import torch

from kd.cache.cache_records import CachedModel, CachedTokens, CacheManifest
from kd.cache.kinds import (
    Heads,
    HiddenKind,
    SampledKind,
    TopKKind,
    VectorKind,
    kind_of,
    parameters_of,
)
from kd.cache.store import (
    BLOCK,
    ShardWriter,
    damage_of,
    open_cache,
    remove_shard,
    remove_unfinished,
)
from kd.errors import UserError
from kd.files import write_json
from kd.losses import Head

LENGTHS = (1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7)
HIDDEN = 5


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def states(number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(LENGTHS[number], HIDDEN, generator=generator)


def manifest() -> CacheManifest:
    kind = HiddenKind("fp32")
    return CacheManifest(
        kind=kind.name,
        parameters=parameters_of(kind),
        vocab_size=11,
        teacher=CachedModel(model="t", weights_sha256="0", hidden_size=HIDDEN, vocab_size=11),
        tokens=CachedTokens(tokenizer_sha256="0"),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of five rows in two shards."""
    write_json(tmp_path / "manifest.json", manifest().model_dump())
    writer = ShardWriter(tmp_path, "a", shard_bytes=4 * HIDDEN * 2 * BLOCK)
    for number in range(len(LENGTHS)):
        writer.add(key(number), {"hidden": states(number)})
    writer.flush()
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) == 2
    return tmp_path


def test_every_part_of_every_row_is_read_as_it_was_written(folder: Path):
    cache = open_cache(folder)
    assert len(cache) == len(LENGTHS)
    for number, length in enumerate(LENGTHS):
        assert key(number) in cache
        whole = states(number)
        cuts = {0, 1, length // 2, length - 1, length, min(BLOCK, length)}
        for start in cuts:
            for stop in {c for c in cuts if c >= start}:
                read = cache.read(key(number), start, stop)
                assert torch.equal(read["hidden"], whole[start:stop]), (number, start, stop)
    assert key(99) not in cache


def test_more_than_a_row_holds_is_refused(folder: Path):
    with pytest.raises(UserError, match="tokens 0 to 2 were asked of a row of 1 tokens"):
        open_cache(folder).read(key(0), 0, 2)


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "shards").glob("*.safetensors"))


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_a_flipped_byte_is_found_where_it_is_read_and_by_its_shards_hash(folder: Path):
    # The last byte of a shard is of its last tensor, by name: states
    damaged = shards(folder)[1]
    with damaged.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    begin, end = header["hidden"]["data_offsets"]
    flip(damaged, damaged.stat().st_size - header_end(header) + begin + (end - begin) // 2)
    cache = open_cache(folder)
    number = len(LENGTHS) - 1
    with pytest.raises(
        UserError, match=rf"{damaged.name} is damaged: a row differs from its checksum"
    ):
        cache.read(key(number), 0, LENGTHS[number])
    assert [path for path, _ in damage_of(folder)] == [damaged]


def header_end(header: dict) -> int:
    """Bytes of all tensors."""
    return max(facts["data_offsets"][1] for name, facts in header.items() if name[0] != "_")


def test_a_block_that_is_not_read_is_not_looked_at(folder: Path):
    """A damaged end of a trace does not keep a shorter run from its beginning."""
    number = len(LENGTHS) - 1
    damaged = shards(folder)[1]
    with damaged.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    _, end = header["hidden"]["data_offsets"]
    flip(damaged, damaged.stat().st_size - header_end(header) + end - 1)
    cache = open_cache(folder)
    assert torch.equal(cache.read(key(number), 0, 9)["hidden"], states(number)[:9])
    with pytest.raises(UserError, match="is damaged"):
        cache.read(key(number), 0, LENGTHS[number])


@pytest.mark.parametrize("how", ["cut", "removed"])
def test_a_shard_that_is_cut_or_missing_is_named(folder: Path, how: str):
    path = shards(folder)[0]
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    with pytest.raises(UserError, match=rf"{path.name} is damaged: it"):
        open_cache(folder)
    assert [found for found, _ in damage_of(folder)] == [path]
    remove_shard(path)
    rows_of_first = len(LENGTHS) - len(open_cache(folder))
    assert 0 < rows_of_first < len(LENGTHS), "only its rows are missing"


def test_what_a_killed_writer_leaves_is_not_read(folder: Path):
    whole = len(open_cache(folder))
    (folder / "shards" / "b-000000.partial").write_bytes(b"half")
    (folder / "shards" / "b-000001.safetensors").write_bytes(b"without its record")
    assert len(open_cache(folder)) == whole
    remove_unfinished(folder)
    assert len(list((folder / "shards").iterdir())) == 4


def test_another_writer_of_the_same_name_overwrites_nothing(folder: Path):
    before = {path: path.read_bytes() for path in shards(folder)}
    writer = ShardWriter(folder, "a")
    writer.add(key(77), {"hidden": torch.ones(3, HIDDEN)})
    writer.flush()
    assert {path: path.read_bytes() for path in before} == before
    assert len(open_cache(folder)) == len(LENGTHS) + 1


def test_what_is_no_cache_is_said(tmp_path: Path):
    with pytest.raises(UserError, match=r"is not a cache, since it has no manifest.json"):
        open_cache(tmp_path)


@pytest.mark.parametrize(
    "kind", [HiddenKind("int8"), TopKKind(3, 2.0), SampledKind(5), VectorKind("ab", 2.0, "fp32")]
)
def test_a_kind_is_what_its_manifest_says(kind):
    assert kind_of(kind.name, parameters_of(kind)) == kind


def test_a_kind_of_a_later_version_is_refused():
    with pytest.raises(
        UserError, match="kind = 'sketch': this version reads only hidden, top_k, sampled, vector"
    ):
        kind_of("sketch", {})
    with pytest.raises(UserError, match="kind = 'top_k'"):
        kind_of("top_k", {"depth": 3})


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 0.0), ("bf16", 4e-3), ("int8", 1e-2)])
@pytest.mark.parametrize("size", [64, 70])  # whole groups of channels, and a part of one
def test_hidden_states_come_back_within_what_their_dtype_holds(dtype, bound: float, size: int):
    hidden = torch.randn(9, size, generator=torch.Generator().manual_seed(0))
    hidden[3] = 0  # a group without a value
    hidden[:, 5] *= 1000  # an outlier, which only its own group should suffer from
    kind = HiddenKind(dtype)
    head = Head(torch.zeros(4, size), None, None, 1.0)
    stored = kind.encode(hidden, Heads(head, None, 4), seed=0)
    back = kind.decode(stored, torch.float32)["hidden"]
    assert back.shape == hidden.shape
    quiet = [c for c in range(size) if c // 32 != 0]
    for columns in (slice(None), quiet):
        error = (back[:, columns] - hidden[:, columns]).norm() / hidden[:, columns].norm()
        assert error <= bound
    assert sum(t.nbytes for t in stored.values()) / 9 == pytest.approx(
        kind.bytes_per_token(size, 0), rel=0.05
    )


def test_top_k_holds_the_likeliest_tokens_of_what_both_models_share():
    torch.manual_seed(0)
    hidden, head = torch.randn(5, 8), Head(torch.randn(20, 8), torch.randn(20), 30.0, 0.5)
    heads = Heads(head, None, vocab_size=16)
    fields = TopKKind(4, temperature=2.0).encode(hidden, heads, seed=0)
    logits = 30.0 * torch.tanh(0.5 * (hidden @ head.weight_VH.T + head.bias_V) / 30.0)
    expected = torch.log_softmax(logits / 2.0, -1)[:, :16].topk(4)
    assert torch.equal(fields["ids"].long(), expected.indices)
    torch.testing.assert_close(fields["logprobs"], expected.values)
    with pytest.raises(UserError, match="--num-tokens 17: the models share only 16 tokens"):
        TopKKind(17).encode(hidden, heads, seed=0)


def kinds_problem() -> tuple[torch.Tensor, Heads]:
    torch.manual_seed(0)
    teacher = Head(torch.randn(28, 8), None, None, 1.0)
    student = Head(torch.randn(30, 6), torch.randn(30), None, 0.5)
    return torch.randn(5, 8), Heads(teacher, student, vocab_size=28)


def test_a_vector_is_the_teachers_probabilities_times_the_students_head():
    hidden, heads = kinds_problem()
    fields = VectorKind("", 2.0, "fp32").encode(hidden, heads, seed=0)
    p = torch.softmax(hidden @ heads.teacher.weight_VH.T / 2.0, -1)
    torch.testing.assert_close(fields["vector"], p @ heads.student.weight_VH[:28])
    torch.testing.assert_close(fields["bias"][:, 0], p @ heads.student.bias_V[:28])
    torch.testing.assert_close(fields["entropy"][:, 0], -(p * p.log()).sum(-1))


def test_the_same_trace_has_the_same_draws_as_often_as_they_are_likely():
    hidden, heads = kinds_problem()
    kind = SampledKind(4000, 2.0)
    first, again, other = (kind.encode(hidden, heads, seed)["ids"] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    p = torch.softmax(hidden @ heads.teacher.weight_VH.T / 2.0, -1)
    counted = torch.nn.functional.one_hot(first.long(), 28).float().mean(1)
    assert float((counted - p).abs().max()) < 4 * (0.25 / 4000) ** 0.5
