"""Names that users give and that become files: each is one plain name inside its folder."""

from kd.errors import UserError

# File systems take 255. What is added to a name makes it longer: ".NAME.responses.jsonl".
MAX_NAME_BYTES = 200


def check_name(field: str, name: str, remedy: str = "choose another name") -> str:
    """The name itself. Raises UserError that says why it cannot be the name of a file or folder."""
    problem = _problem_of(name)
    if problem:
        raise UserError(f"{field} = {shortened(name)}: {problem}: {remedy}")
    return name


def plain_name(name: str) -> str:
    """As check_name, for a field of a model: the ValueError says what is wrong, the model where."""
    problem = _problem_of(name)
    if problem:
        raise ValueError(f"{problem}: choose a plain name, such as trial_1")
    return name


def shortened(value: object, length: int = 200) -> str:
    """The value as a message shows it."""
    try:
        text = repr(list(value) if isinstance(value, tuple) else value)
    except ValueError:  # Python writes no number of 5,000 digits
        return "a number of thousands of digits"
    return text if len(text) <= length else f"{text[:length]}... ({len(text)} characters)"


def _problem_of(name: str) -> str | None:
    if not name or name != name.strip():
        return "a name must not be blank, and must not begin or end with a space"
    if name in (".", "..") or "/" in name or "\\" in name:
        return "a name must be that of one folder or file, without a path"
    if name.startswith("-"):
        return "a name must not begin with -, since most commands take it for an option"
    if not name.isprintable():
        return "a name must not hold control characters such as line breaks"
    size = len(name.encode(errors="replace"))
    if size > MAX_NAME_BYTES:
        return f"a name may have at most {MAX_NAME_BYTES} bytes, but this one has {size}"
    return None
