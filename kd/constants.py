"""Constants that every package of kd agrees on."""

IGNORE_INDEX = -100
