"""The licence that a card states: that of the base model, unless another one is given."""

from pathlib import Path

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # as in push.py
from yaml import YAMLError

from kd.errors import UserError
from kd.hub import first_line
from kd.recipe import find_input

KEYS = ("license", "license_name", "license_link")


def find_licence(asked: str | None, model: str | None, revision: str | None) -> dict[str, str]:
    """KEYS of a card's metadata: `asked`, or else what the README.md of the base model says, in its
    local folder or on the hub.

    model: None where the student began with random weights. Raises UserError where neither says.
    """
    if asked is not None:
        return {"license": asked}
    if model is None:
        why = (
            "the student began with random weights, so there is no base model whose licence applies"
        )
    else:
        try:
            metadata = ModelCard.load(_card_of(model, revision)).data.to_dict()
        except (OSError, ValueError, YAMLError, HTTPError) as error:
            why = f"the licence of the base model {model!r} cannot be read ({first_line(error)})"
        else:
            # The hub also takes a list of several licences: which one holds is for people to say.
            if isinstance(metadata.get("license"), str):
                return {key: metadata[key] for key in KEYS if isinstance(metadata.get(key), str)}
            why = f"the README.md of the base model {model!r} states no single licence"
    raise UserError(
        f"--license is required: {why}; give a licence id of the hub, such as --license "
        "apache-2.0, or --license other"
    )


def _card_of(model: str, revision: str | None) -> Path:
    folder = find_input(model)
    if folder is not None:
        return folder / "README.md"
    return Path(hf_hub_download(model, "README.md", revision=revision))
