"""A run's export on a hub: the real client of huggingface_hub against a server on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from publish.conftest import Export
from publish.hub_server import OWNER, TOKEN, Hub, Repository
from tiny import ROOT, free_port
from transformers import AutoModelForCausalLM

from kd.errors import UserError

NAME = f"{OWNER}/student"


def exported(run: Path) -> dict[str, bytes]:
    best = run / "export" / "best"
    files = (path for path in best.rglob("*") if path.is_file())
    return {str(path.relative_to(best)): path.read_bytes() for path in files}


def test_what_arrives_is_the_export_and_its_card_byte_for_byte_in_one_commit(
    hub: Hub, run: Path, export: Export, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    export(run, "--push", NAME)
    repository = hub.repositories[NAME]
    arrived = dict(repository.branches["main"])
    card = arrived.pop("README.md").decode()
    assert arrived.pop(".gitattributes")
    assert arrived == exported(run)
    assert arrived["model.safetensors"] in hub.objects.values(), "the weights went by LFS"
    assert arrived["adapter/adapter_model.safetensors"] in hub.objects.values()
    assert repository.num_commits == 1
    assert not repository.private
    assert "license: mit\n" in card
    export(run, "--card", tmp_path / "card.md")
    assert (tmp_path / "card.md").read_text() == card
    assert capsys.readouterr().out.startswith(f"{hub.endpoint}/{NAME}/commit/")
    for path, content in arrived.items():
        (tmp_path / "fetched" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fetched" / path).write_bytes(content)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "fetched").num_parameters() > 1000


def test_a_later_push_replaces_all_weights_and_leaves_what_others_wrote(
    hub: Hub, run: Path, export: Export
):
    export(run, "--push", NAME)
    hub.repositories[NAME].branches["main"]["notes.md"] = b"mine"
    best = run / "export" / "best"
    (best / "model.safetensors").rename(best / "model-00001-of-00001.safetensors")
    (best / "model.safetensors.index.json").write_text("{}")
    (best / "adapter" / "adapter_model.safetensors").unlink()
    (best / "adapter" / "adapter_config.json").unlink()
    export(run, "--push", NAME)
    arrived = hub.repositories[NAME].branches["main"]
    assert set(arrived) - {"README.md", ".gitattributes", "notes.md"} == set(exported(run))
    assert arrived["notes.md"] == b"mine"
    assert hub.repositories[NAME].num_commits == 2


def test_a_branch_is_made_and_main_is_left_alone(hub: Hub, run: Path, export: Export):
    for _ in range(2):  # the second time it is there
        export(run, "--push", NAME, "--revision", "keep/0.5")
    branches = hub.repositories[NAME].branches
    assert set(branches["main"]) == {".gitattributes"}
    assert exported(run).items() <= branches["keep/0.5"].items()


def test_the_card_alone_is_pushed_over_the_old_one_and_weights_stay(
    hub: Hub, run: Path, export: Export
):
    export(run, "--push", NAME)
    export(run, "--push", NAME, "--card-only", "--license", "apache-2.0")
    arrived = dict(hub.repositories[NAME].branches["main"])
    assert b"license: apache-2.0\n" in arrived["README.md"]
    assert exported(run).items() <= arrived.items()


def test_a_private_repository_is_made_private_and_a_public_one_is_refused(
    hub: Hub, run: Path, export: Export
):
    export(run, "--push", NAME, "--private")
    assert hub.repositories[NAME].private
    hub.repositories[f"{OWNER}/public"] = Repository()
    with pytest.raises(UserError, match="--private: the repository exists and is public"):
        export(run, "--push", f"{OWNER}/public", "--private")
    assert hub.repositories[f"{OWNER}/public"].num_commits == 0


def test_a_dry_run_lists_every_file_and_asks_no_network(
    hub: Hub,
    run: Path,
    export: Export,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.delenv("HF_TOKEN")
    export(run, "--push", NAME, "--dry-run", "--license", "mit")
    listed = [line.split() for line in capsys.readouterr().out.splitlines()[:-1]]
    sizes = {name: int(size.replace(",", "")) for size, name in listed}
    assert sizes.pop("README.md") > 500
    assert sizes == {name: len(content) for name, content in exported(run).items()}
    assert hub.requests == []


@pytest.mark.parametrize("name", ["student", "me/a/b", "me/", "/student", "me/a b", "me/a..b", " "])
def test_a_name_that_no_repository_can_have_is_refused(
    hub: Hub, run: Path, export: Export, name: str
):
    with pytest.raises(UserError) as caught:
        export(run, "--push", name)
    assert str(caught.value).startswith(f"--push {name!r}: ")
    assert hub.requests == []


def test_what_is_not_finished_or_not_there_is_refused(hub: Hub, run: Path, export: Export):
    best = run / "export" / "best"
    best.rename(run / "export" / "last")
    with pytest.raises(UserError, match="--which best: .* holds no export .*: --which last"):
        export(run, "--push", NAME)
    (run / "export" / "last").rename(run / "gone")
    with pytest.raises(UserError, match="--which last: .*copy it from"):
        export(run, "--push", NAME, "--which", "last")
    (run / "SUCCESS").unlink()
    with pytest.raises(UserError, match=r"not finished \(no SUCCESS\) after step 2"):
        export(run, "--push", NAME)
    with pytest.raises(UserError, match="no run is there"):
        export(run / "export", "--push", NAME)
    assert NAME not in hub.repositories


def test_the_name_of_a_folder_with_several_runs_is_refused(hub: Hub, run: Path, export: Export):
    run.rename(run.parent / "other")
    (run.parent / "student").mkdir()
    for name in ("recipe.json", "environment.json", "metrics.jsonl", "SUCCESS"):
        (run.parent / "student" / name).write_bytes((run.parent / "other" / name).read_bytes())
    with pytest.raises(UserError, match="holds 2 runs: name one of them"):
        export(run.parent, "--push", NAME)


def test_whoever_is_not_logged_in_is_told_how(
    hub: Hub, run: Path, export: Export, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="not logged in .*hf auth login"):
        export(run, "--push", NAME, "--license", "mit")
    assert hub.requests == []
    monkeypatch.setenv("HF_TOKEN", "hf_of_yesterday")
    with pytest.raises(UserError, match="does not accept the token"):
        export(run, "--push", NAME, "--license", "mit")


@pytest.mark.parametrize("is_there", [False, True])
def test_a_repository_of_another_owner_is_refused(
    hub: Hub, run: Path, export: Export, is_there: bool
):
    if is_there:
        hub.repositories["others/student"] = Repository()
    with pytest.raises(UserError, match=r"--push others/student: the token may not write there"):
        export(run, "--push", "others/student")
    assert not is_there or hub.repositories["others/student"].num_commits == 0


def test_without_a_network_the_error_says_so(
    hub: Hub, run: Path, export: Export, monkeypatch: pytest.MonkeyPatch
):
    arguments = (run, "--push", NAME, "--license", "mit")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match="the hub cannot be reached"):
        export(*arguments)

    def unknown_host(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", unknown_host)
        with pytest.raises(UserError, match="the hub cannot be reached"):
            export(*arguments)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="the hub cannot be reached"):
        export(*arguments)


def test_metadata_that_the_hub_refuses_is_an_error_before_anything_is_uploaded(
    hub: Hub, run: Path, export: Export
):
    with pytest.raises(UserError, match="Invalid metadata in README.md"):
        export(run, "--push", NAME, "--license", "My Own")
    assert not any("preupload" in request for request in hub.requests)


@pytest.mark.parametrize(
    ("failing", "status"),
    [
        ("PUT /lfs/", 400),
        ("POST /verify/", 403),
        (f"POST /api/models/{NAME}/preupload", 403),
        (f"POST /api/models/{NAME}/commit", 500),
        (f"POST /api/models/{NAME}/commit", 412),
    ],
)
def test_a_push_that_fails_leaves_the_repository_as_it_was_and_the_next_one_is_whole(
    hub: Hub, run: Path, export: Export, failing: str, status: int
):
    hub.failures[failing] = status
    with pytest.raises(UserError) as caught:
        export(run, "--push", NAME)
    assert str(caught.value).startswith(f"--push {NAME}: ")
    assert "has either all of the files or none" in str(caught.value)
    assert set(hub.repositories[NAME].branches["main"]) == {".gitattributes"}
    hub.failures.clear()
    export(run, "--push", NAME)
    assert exported(run).items() <= hub.repositories[NAME].branches["main"].items()


@pytest.mark.process
def test_the_command_itself_pushes_to_the_hub_of_hf_endpoint(hub: Hub, run: Path, tmp_path: Path):
    variables = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    variables |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "export.py", run, "--push", NAME],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub.endpoint}/{NAME}/commit/{1:040}\n"
    assert exported(run).items() <= hub.repositories[NAME].branches["main"].items()
