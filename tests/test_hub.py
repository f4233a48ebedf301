"""What the hub answers, in the user's words: the hub client's own errors, raised by hand without a
network.
"""

import pytest
from huggingface_hub import errors

from kd.errors import UserError
from kd.hub import hub_errors, resolve

REMEDIES = {
    errors.GatedRepoError: "access is gated: accept the terms",
    errors.RepositoryNotFoundError: "neither a local path nor an id that the hub knows",
    errors.RevisionNotFoundError: "the hub has no such revision",
    errors.OfflineModeIsEnabled: "run launch/prepare.py",
    errors.LocalEntryNotFoundError: "run launch/prepare.py",
}


def answer(error: type[Exception], *, wrapped: bool) -> None:
    """Raise the hub's error as it is, or as transformers passes it on. Without its response, which
    needs a server.
    """
    cause = error.__new__(error, "no")
    if not wrapped:
        raise cause
    raise OSError("owner/name could not be loaded") from cause


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("error", "remedy"), REMEDIES.items())
def test_each_answer_names_field_value_and_remedy(error, remedy, wrapped):
    with pytest.raises(UserError) as caught, hub_errors("teacher.model", "owner/name"):
        answer(error, wrapped=wrapped)
    assert str(caught.value).startswith("teacher.model = 'owner/name': ")
    assert remedy in str(caught.value)


def test_a_local_path_that_is_missing_is_not_asked_of_the_hub(tmp_path):
    assert resolve("teacher.model", str(tmp_path)) == str(tmp_path)
    assert resolve("teacher.model", "owner/name") == "owner/name"
    with pytest.raises(UserError, match="teacher.model = '/no/such': no such file or folder"):
        resolve("teacher.model", "/no/such")
