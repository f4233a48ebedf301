"""What keys of the recipe may hold: numbers that every consumer takes, and texts that can be names
and paths.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from kd.names import plain_name

MAX_COUNT = 2**31 - 1
MAX_PATH_BYTES, MAX_PART_BYTES = 4095, 255  # of Linux
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3  # logits stay finite when divided by it


def is_storable(value: Any) -> bool:
    """False for a text that no file takes: with a NUL, or with half of a surrogate pair."""
    if not isinstance(value, str):
        return True
    return not any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value)


def _filled(text: str) -> str:
    if not text.strip():
        raise ValueError("it is blank: write a value, or leave the key out")
    return text


def _path(text: str) -> str:
    sizes = [len(part.encode(errors="replace")) for part in _filled(text).split("/")]
    if max(sizes) > MAX_PART_BYTES or sum(sizes) + len(sizes) - 1 > MAX_PATH_BYTES:
        raise ValueError(
            f"the path is too long: at most {MAX_PART_BYTES} bytes between two slashes, and "
            f"{MAX_PATH_BYTES} in all"
        )
    return text


def _folder_name(text: str) -> str:
    return plain_name(text) if text else text


def _greedy_or_drawn(temperature: float) -> float:
    if 0.0 < temperature < MIN_TEMPERATURE:
        raise ValueError(f"use 0 for greedy decoding, or at least {MIN_TEMPERATURE:g} to sample")
    return temperature


Positive = Annotated[int, Field(gt=0, le=MAX_COUNT)]
Whole = Annotated[int, Field(ge=0, le=MAX_COUNT)]
BatchSize = Annotated[int, Field(gt=0, le=2**20)]
NumProcesses = Annotated[int, Field(gt=0, le=1024)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # what numpy, torch and vLLM all take
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Seconds = Annotated[float, Field(ge=0.0, le=86_400.0)]  # a day
Minutes = Annotated[float, Field(gt=0.0, le=525_600.0)]  # a year
# Far inside of what float32 holds, in which they meet tensors.
Magnitude = Annotated[float, Field(gt=0.0, ge=1e-30, le=1e30)]
Weight = Annotated[float, Field(ge=0.0, le=1e30)]
Temperature = Annotated[float, Field(gt=0.0, ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)]
SamplingTemperature = Annotated[
    float, Field(ge=0.0, le=MAX_TEMPERATURE), AfterValidator(_greedy_or_drawn)
]

Filled = Annotated[str, AfterValidator(_filled)]
Token = Annotated[str, Field(min_length=1)]
PathText = Annotated[str, AfterValidator(_path)]
FolderName = Annotated[str, AfterValidator(_folder_name)]  # blank: the recipe's own name
