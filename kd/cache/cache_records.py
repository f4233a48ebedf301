"""The records of a cache: manifest.json, and a file for each shard."""

from typing import Any, Literal

from pydantic import Field

from kd.runs.records import Amount, Count, Record, Text

REMEDY = "restore it, or fill another folder"


class CachedModel(Record):
    """The teacher, by what its checkpoint holds."""

    model: Text
    revision: str | None = None
    weights_sha256: Text
    hidden_size: Count
    vocab_size: Count


class CachedTokens(Record):
    """How rows became tokens."""

    tokenizer_sha256: Text
    chat_template: str | None = None


class CacheManifest(Record):
    """manifest.json."""

    format_version: Literal[1] = 1
    kind: Text
    parameters: dict[str, Any] = Field(default_factory=dict)
    vocab_size: Count  # that teacher and student share
    teacher: CachedModel
    server: str | None = None  # the software that filled it, where a server did
    tokens: CachedTokens


class ShardRecord(Record):
    """NAME.json, written when NAME.safetensors is whole."""

    num_rows: Count
    num_tokens: Count
    bytes: Count
    sha256: Text
    rank_seconds: Amount = 0.0  # that one rank took for it, from the shard before
