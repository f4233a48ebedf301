import pytest

from kd.data.thought import split_thought


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\na\n</think>\n\nb", ("\na\n", "\n\nb")),
        (" \n<think>a</think>b", ("a", "b")),
        ("a</think>b", ("a", "b")),  # the template had opened it
        ("</think>", ("", "")),
        ("a", "unclosed"),
        ("<think>a", "unclosed"),
        ("<think>a</think>b</think>", "reopened"),
        ("<think><think>a</think>b", "reopened"),
        ("<think>a</think><think>b", "reopened"),
        ("a</think><think>b", "reopened"),
        ("Hm. <think>a</think>b", "text before"),
    ],
)
def test_a_thought_is_what_stands_before_the_one_closing_marker(
    text: str, expected: object
) -> None:
    assert split_thought(text, "<think>", "</think>") == expected


def test_a_thought_may_have_no_opening_marker() -> None:
    assert split_thought("a\n#### 4", "", "####") == ("a\n", " 4")
