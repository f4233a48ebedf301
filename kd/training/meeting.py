"""How every collective command of training begins: ranks meet, and read the data one node at a
time.
"""

from datetime import timedelta

from transformers import PreTrainedTokenizerFast

from kd.data.dataset import Data, load_data
from kd.distributed.agreement import check_same_everywhere
from kd.distributed.layout import Layout
from kd.distributed.process_group import barrier, init_distributed
from kd.recipe import Recipe
from kd.runs.environment import facts_of_rank


def meet(recipe: Recipe) -> Layout:
    """Join the other ranks, once all have the same recipe and software. Collective."""
    meeting = timedelta(minutes=recipe.run.rendezvous_timeout_minutes)
    check_same_everywhere(facts_of_rank(recipe), meeting)
    return init_distributed(recipe.run.collective_timeout_minutes)


def load_data_by_node(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, layout: Layout) -> Data:
    """One rank of each node first: it tokenises, unless that was done before; the others find its
    cache. Collective: every rank must call this.
    """
    data = load_data(recipe, tokenizer) if layout.is_first_on_node else None
    barrier()
    return data or load_data(recipe, tokenizer)
