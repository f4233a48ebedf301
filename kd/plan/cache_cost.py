"""What a teacher's cache costs and saves."""

from kd.cache.kinds import HiddenKind, Kind, kind_of
from kd.cache.store import read_manifest
from kd.data.truncate import IntArray
from kd.errors import UserError
from kd.plan.cost import RunPlan
from kd.plan.flops import forward_flops
from kd.plan.gpus import Site
from kd.plan.lengths import DataTraces, Traces
from kd.plan.shapes import model_shapes
from kd.recipe import Recipe


def describe_cache(recipe: Recipe, plan: RunPlan, traces: Traces, site: Site | None) -> str:
    """A sentence on the recipe's cache, or on one that it could have; "" without a teacher."""
    if recipe.teacher is None:
        return ""
    sizes = [model_shapes(recipe.teacher, role="teacher").hidden_size]
    sizes += [model_shapes(recipe.student, role="student").hidden_size]
    if recipe.teacher.cache is not None:
        manifest = read_manifest(recipe.teacher.cache)
        each = kind_of(manifest.kind, manifest.parameters).bytes_per_token(*sizes)
        read_mb = each * plan.num_input_tokens_per_step / plan.world_size / 1e6
        text = f"teacher.cache of kind {manifest.kind}: a rank reads {read_mb:.1f} MB per step"
        if site:
            text += f", {read_mb / plan.step_time(site).seconds:.0f} MB/s"
        return text
    share = plan.flops_per_step.teacher / plan.flops_per_step.model
    text = f"teacher.cache would save {share:.0%} of the FLOPs and the teacher's memory"
    num_tokens = _num_tokens(traces)
    if num_tokens:
        gigabytes = HiddenKind("bf16").bytes_per_token(*sizes) * num_tokens / 1e9
        text += (
            f", and take {gigabytes:,.0f} GB on disk (bf16 hidden states of {num_tokens:,} tokens)"
        )
    return text


def filling_flops(recipe: Recipe, kind: Kind, lengths_N: IntArray) -> float | None:
    """Of one pass of the teacher over N rows, with its logits where the kind is made of them (for a
    vector, the product of their probabilities with the student's head too). None where the models'
    shapes are not known.
    """
    assert recipe.teacher is not None
    try:
        teacher = model_shapes(recipe.teacher, role="teacher")
        student = model_shapes(recipe.student, role="student")
    except UserError:
        return None
    widths = {"hidden": 0, "vector": teacher.hidden_size + student.hidden_size}
    width = widths.get(kind.name, teacher.hidden_size)
    head = 2 * float(lengths_N.sum()) * teacher.vocab_size * width
    return forward_flops(teacher, lengths_N) + head


def _num_tokens(traces: Traces) -> int | None:
    """Of whole training traces."""
    if isinstance(traces, DataTraces):
        return int(traces.examples.num_tokens_N3.sum())
    return traces.num_rows and traces.num_rows * traces.mean
