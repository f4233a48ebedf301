"""Push files to a model repository of the Hugging Face hub in one commit: all of them or none.

Run against a server in a test, which speaks the part of the hub's API that huggingface_hub uses
here with LFS uploads (tests/publish/hub_server.py). It was not run against the hub itself, nor with
Xet, by which huggingface_hub uploads large files where hf_xet is installed.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HFValidationError,
    HTTPError,  # of httpx or httpx2: another one by the client's version
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from kd.errors import UserError
from kd.hub import causes, first_line

# transformers would load the weights of an earlier export along with those of this one.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "adapter/*")
_AGAIN = "push again"
_REMEDIES = {
    401: "the hub does not accept the token: run `hf auth login` again, or set HF_TOKEN",
    403: "the token may not write there: name a repository of your own or of your organisation, "
    "and use a token with write access",
    404: "the hub does not find it, or this token cannot see it: check owner, name and --revision",
    409: f"the repository changed in the meantime: {_AGAIN}",
    412: f"the repository changed in the meantime: {_AGAIN}",
}
_NETWORK = ("TransportError", "ConnectionError")  # the first is httpx's


def exported_files(run: Path, which: str) -> dict[str, Path]:
    """Path in the repository -> file, of all of export/WHICH. Raises UserError when it is not
    there.
    """
    folder = run / "export" / which
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    if "config.json" not in files:
        others = [path.parent.name for path in sorted(run.glob("export/*/config.json"))]
        remedy = f"--which {others[0]}" if others else "copy it from the machine that trained it"
        raise UserError(f"--which {which}: {folder} holds no export of a model: {remedy}")
    return files


def check_repo_id(repo_id: str) -> None:
    """Raises UserError for what is not owner/name."""
    problem = "it does not have the form owner/name"
    try:
        validate_repo_id(repo_id)
        is_valid = repo_id.count("/") == 1
    except HFValidationError as error:
        is_valid, problem = False, first_line(error)
    if not is_valid:
        raise UserError(f"--push {repo_id!r}: {problem}: write it like --push my-name/my-model")


def push(
    files: Mapping[str, Path | bytes], repo_id: str, *, private: bool, revision: str | None
) -> str:
    """Make the repository (and the branch `revision`) unless it is there, and commit the files;
    returns the commit's address.

    Weights of an earlier export that this one does not have are deleted by the same commit; all
    else in the repository stays. Raises UserError where there is no token, no network or no
    permission, and for private = True where the repository is there and public.
    """
    with _push_errors(repo_id):
        if get_token() is None:
            raise UserError(
                f"--push {repo_id}: not logged in to the hub: run `hf auth login`, or set "
                "HF_TOKEN to a token with write access"
            )
        api = HfApi()
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.model_info(repo_id, revision=revision)
        if private and not there.private:
            raise UserError(
                f"--push {repo_id} --private: the repository exists and is public: make it "
                "private in its settings on the hub, or name a new one"
            )
        # Not upload_folder: with Xet it makes several commits.
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, content) for name, content in files.items()),
                *(
                    CommitOperationDelete(name)
                    for name in _stale({file.rfilename for file in there.siblings or ()}, files)
                ),
            ],
            commit_message="Add the model card" if set(files) == {"README.md"} else "Add the model",
            revision=revision,
        )
    return commit.commit_url


def _stale(there: set[str], files: Mapping[str, Path | bytes]) -> list[str]:
    """Weights that are not among the files; none when no weights are."""
    if not any(fnmatch(name, "*.safetensors") for name in files):
        return []
    left = sorted(there - files.keys())
    return [name for name in left if any(fnmatch(name, pattern) for pattern in WEIGHTS)]


@contextmanager
def _push_errors(repo_id: str) -> Iterator[None]:
    """Translate what the hub's client may raise to a UserError with a remedy."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        chain = list(causes(error))
        responses = [r for e in chain if (r := getattr(e, "response", None)) is not None]
        names = {cls.__name__ for e in chain for cls in type(e).__mro__}
        if responses:
            status = responses[0].status_code
            remedy = _REMEDIES.get(status, f"the hub answers with status {status}: {_AGAIN} later")
        elif names & set(_NETWORK):
            remedy = f"the hub cannot be reached: {_AGAIN} on a machine with network access"
        else:
            remedy = f"it was not pushed: correct the error below, then {_AGAIN}"
        raise UserError(
            f"--push {repo_id}: {remedy}. The repository has either all of the files or none.\n"
            f"({type(error).__name__}: {_one_line(error)})"
        ) from error


def _one_line(error: BaseException) -> str:
    """The hub's client puts the hub's own words in a later line."""
    return " ".join(str(error).split())[:300]
