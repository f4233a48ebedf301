"""Split a response into thought and answer by the markers around the thought."""

from typing import Literal

Fault = Literal["unclosed", "reopened", "text before"]


def split_thought(text: str, opening: str, closing: str) -> tuple[str, str] | Fault:
    """(thought, what follows it), or why not.

    closing occurs once. opening comes before all else; it may be absent, as in a response to a
    prompt that ends with it because the chat template opened the thought.
    """
    thought, closed, answer = text.partition(closing)
    before, opened, inside = thought.partition(opening) if opening else ("", "", thought)
    if not closed:
        return "unclosed"
    if closing in answer or (opening and opening in inside + answer):
        return "reopened"
    if opened and before.strip():
        return "text before"
    return (inside if opened else thought), answer
