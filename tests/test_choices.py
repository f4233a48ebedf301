"""A recipe cannot name what the code does not know, nor is there what no recipe can name."""

from typing import get_args

from kd.data.sources import SOURCES
from kd.data.truncate import SECTIONS
from kd.losses import DIVERGENCES
from kd.recipe import DataSection, LossSection, SectionName


def test_divergences_are_those_of_the_recipe():
    choices = get_args(LossSection.model_fields["divergence"].annotation)
    assert len(choices) > 1
    assert set(choices) == set(DIVERGENCES)


def test_sources_are_those_of_the_recipe():
    choices = get_args(DataSection.model_fields["source"].annotation)
    assert len(choices) > 1
    assert set(choices) == set(SOURCES)


def test_sections_are_those_of_the_recipe():
    assert get_args(SectionName) == SECTIONS
