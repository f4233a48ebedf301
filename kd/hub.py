"""Names of models and datasets: a local path or a hub id, and the hub's answers in plain words."""

import glob
import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kd.compressed import SUFFIXES, uncompressed_suffix
from kd.errors import UserError
from kd.recipe import SHIPPED_DIR, ModelSection, find_input, is_hub_id

log = logging.getLogger(__name__)

DATA_KINDS = (".jsonl", ".json", ".parquet")
_NAME_DATA = (
    "name a .jsonl or a .parquet file, a .json list, one of these compressed (.jsonl.gz, "
    ".jsonl.zst), a folder of them, or a glob such as 'traces/*.jsonl'"
)

_TEXT_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]


def resolve(field: str, value: str) -> str:
    """The local path that `value` names, or `value` itself when it may be a hub id.

    Raises UserError naming `field`, the recipe's key that holds the value, when it is neither.
    """
    path = find_input(value)
    if path is not None:
        return str(path)
    if is_hub_id(value):
        return value
    raise UserError(
        f"{field} = {value!r}: no such file or folder (relative paths are looked up in the "
        "current directory, then in the repository), and it is not a hub id of the form owner/name"
    )


def find_file(field: str, value: str) -> Path:
    """The local file that `value` names. Raises UserError naming `field` when there is none."""
    path = find_input(value)
    if path is None or not path.is_file():
        raise UserError(
            f"{field} = {value!r}: no such file (relative paths are looked up in the current "
            "directory, then in the repository)"
        )
    return path


def find_model(field: str, section: ModelSection) -> Path | None:
    """A model's folder: the local one, or the snapshot in the hub's cache, None where there is
    none. No network is asked. Raises UserError for a name that can be neither.
    """
    path = Path(resolve(field, section.model))
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{field} = {section.model!r}: it is a file; name the folder of a model")
    from huggingface_hub import snapshot_download

    try:
        name, revision = section.model, section.revision
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # not in the cache: loading it fetches it, or says why not
        return None


def find_data_files(field: str, value: str) -> tuple[Path, ...]:
    """The files of rows that `value` names: one, all below a folder, or those that a glob matches,
    by name; () when it may be a hub id.

    Raises UserError naming `field` when there is none, when one is of no kind that is read, and
    when they are of several kinds: a copy in another form would be read twice.
    """
    if not value.strip() or "\0" in value:
        raise UserError(f"{field} = {value!r}: not a file name: {_NAME_DATA}")
    path = find_input(value)
    if path is not None and path.is_file():
        found = [path]
    elif path is not None:
        found = [file for file in path.rglob("*") if not _is_hidden(file.relative_to(path))]
    elif glob.has_magic(value):
        found = _matches(value)
    else:
        resolve(field, value)
        return ()
    kinds = {file: _kind(file) for file in found if file.is_file()}
    files = sorted((file for file, kind in kinds.items() if kind), key=str)
    if not files:
        raise UserError(f"{field} = {value!r}: no file of rows found: {_NAME_DATA}")
    counts = Counter(kinds[file] for file in files)
    if len(counts) > 1:
        there = " and ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        raise UserError(
            f"{field} = {value!r}: it holds files of several kinds, {there}; name one kind, as in "
            f"{str(Path(value) / '*') if path else value}{min(counts)}"
        )
    if len(files) < len(kinds):
        others = sorted(file.name for file, kind in kinds.items() if not kind)
        log.info(
            "%s = %r: skipped files that are not rows: %s", field, value, ", ".join(others[:5])
        )
    return tuple(files)


def _matches(pattern: str) -> list[Path]:
    """In the current directory, or else in the repository, as for a path."""
    pattern = os.path.expanduser(pattern)
    for folder in (Path(), SHIPPED_DIR):
        names = glob.glob(pattern, root_dir=folder, recursive=True)
        if names:
            return [folder / name for name in names]
    return []


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _kind(path: Path) -> str:
    """Such as ".jsonl.gz"; empty for what is not read."""
    inner, suffix = uncompressed_suffix(path), path.suffix.lower()
    if inner not in DATA_KINDS or (suffix in SUFFIXES and inner == ".parquet"):
        return ""
    return inner + suffix if suffix in SUFFIXES else inner


@contextmanager
def hub_errors(field: str, value: str) -> Iterator[None]:
    """Translate what loading `value` may raise to a UserError with field and remedy."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, ImportError) as error:
        # Libraries wrap the hub's own error, or only quote it: the most telling one of the chain
        # decides.
        chain = list(causes(error))
        remedy = next(
            text for name, text in _REMEDIES.items() if any(_is_named(e, name) for e in chain)
        )
        raise UserError(
            f"{field} = {value!r}: {remedy}\n({type(error).__name__}: {first_line(error)})"
        ) from error


def first_line(error: BaseException) -> str:
    """Of the message of a library, whose advice is for programmers."""
    return str(error).strip().partition("\n")[0][:300]


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def download_model(field: str, model: ModelSection, weights: bool) -> None:
    """Fetch config, tokenizer and, if asked, weights of a hub model. Local models: nothing."""
    name = resolve(field, model.model)
    if os.path.exists(name):
        return
    from huggingface_hub import snapshot_download

    patterns = (
        _TEXT_FILES
        + (["*.safetensors"] if weights else [])
        + (["*.py"] if model.trust_remote_code else [])
    )
    with hub_errors(field, name):
        snapshot_download(name, revision=model.revision, allow_patterns=patterns)


# Names of exception classes, the most telling first: by name, so that no library is imported for an
# error's sake.
_OFFLINE = (
    "the hub cannot be reached, and it is not in the local hub cache: run launch/prepare.py with "
    "this recipe on a machine with network access, or name a local path"
)
_MISSING = (
    "neither a local path nor an id that the hub knows: check the spelling; for a private one, "
    "run `hf auth login` or set HF_TOKEN"
)
_REMEDIES = {
    "GatedRepoError": "access is gated: accept the terms on its hub page, then run `hf auth "
    "login` or set HF_TOKEN",
    "RevisionNotFoundError": "the hub has no such revision: correct or remove `revision`",
    "OfflineModeIsEnabled": _OFFLINE,
    "LocalEntryNotFoundError": _OFFLINE,
    "ConnectError": _OFFLINE,
    "ConnectionError": _OFFLINE,
    "RepositoryNotFoundError": _MISSING,
    "DatasetNotFoundError": _MISSING,
    "HFValidationError": _MISSING,
    "EntryNotFoundError": "a file is missing: a model needs config.json, tokenizer.json and "
    "safetensors",
    "Exception": "it cannot be loaded: it is incomplete, or the installed libraries do not "
    "support it",
}


def _is_named(error: BaseException, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(error).__mro__)
