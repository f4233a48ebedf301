"""What the pickles of a checkpoint may name: nothing is executed to find out."""

import collections
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from kd.engine.pickles import foreign_code, pickle_files

CONTENT = {"weight": torch.ones(3, dtype=torch.bfloat16), "shapes": collections.OrderedDict(a=1)}


class Runs:
    """A pickle of it calls a function when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def zipped(content: bytes, *, name: str = "data.pkl") -> bytes:
    """A file as of torch.save around a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(f"archive/{name}", content)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def test_what_torch_and_deepspeed_write_passes(tmp_path):
    path = tmp_path / "a.pt"
    content = [LossScaler(1.0), ZeroStageEnum.weights, fragment_address(numel=1, start=0)]
    torch.save({**CONTENT, "deepspeed": content}, path)
    assert foreign_code(path) is None
    assert len(torch.load(path, weights_only=False)["deepspeed"]) == 3


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch {marker}",), "posix.system"),
        (eval, ("open('{marker}', 'w')",), "builtin"),
        (exec, ("open('{marker}', 'w')",), "builtin"),
        (getattr, ("{marker}", "upper"), "getattr"),
        (Path, ("{marker}",), "pathlib.Path"),
    ],
    ids=["system", "eval", "exec", "getattr", "path"],
)
def test_foreign_names_are_told_and_not_run(tmp_path, function, arguments, name):
    path, marker = tmp_path / "a.pt", tmp_path / "marker"
    value = Runs(function, *(text.format(marker=marker) for text in arguments))
    torch.save({**CONTENT, "deep": [[value]]}, path)
    found = foreign_code(path) or ""
    assert found.startswith(f"{path} names ")
    assert name in found
    assert not marker.exists()


FORMS = {
    "legacy torch.save": saved(CONTENT, _use_new_zipfile_serialization=False),
    "bare pickle": pickle.dumps(CONTENT["shapes"]),
    "pickle of protocol 4": zipped(pickle.dumps(Runs(os.system, "false"), protocol=4)),
    "pickle of protocol 0": zipped(pickle.dumps(Runs(os.system, "false"), protocol=0)),
    "INST": zipped(b"(S'false'\nios\nsystem\n."),
    "half a pickle": zipped(b"\x80\x02}"),
    "no data.pkl": zipped(b"\x80\x02}.", name="other.pkl"),
    "TorchScript": zipped(b"\x80\x02}.", name="constants.pkl"),
    "half a file": saved(CONTENT)[:-200],
    "empty": b"",
    "text": b"hello",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_another_form_is_refused(tmp_path, form):
    path = tmp_path / "a.pt"
    path.write_bytes(FORMS[form])
    found = foreign_code(path) or ""
    assert found.startswith(f"{path} cannot be scanned as a file written by torch.save (")
    assert "\n" not in found


def test_a_named_pipe_is_refused_without_waiting_and_a_lost_link_too(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "link.pt").symlink_to(tmp_path / "nowhere")
    assert foreign_code(tmp_path / "pipe.pt") == f"{tmp_path / 'pipe.pt'} is not a regular file"
    assert "cannot be scanned" in (foreign_code(tmp_path / "link.pt") or "")


def test_every_file_is_scanned_but_for_what_is_never_unpickled(tmp_path):
    names = ["a.pt", "b.bin", "c.pth", "d.pkl", "no_suffix", "deep/er/e.pt"]
    others = ["manifest.json", "rng_rank0.safetensors", "offloaded_tensors/x.tensor.swp"]
    for name in names + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "f.pt")
    found = {str(path.relative_to(tmp_path)) for path in pickle_files(tmp_path)}
    assert found == {*names, "f.pt"}
