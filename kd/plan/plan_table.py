"""The plans of a recipe at several lengths, as a table in the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

# Title of a row -> its key in the JSON.
GIB_PER_RANK = {
    "teacher shard": "teacher_shard",
    "student weights": "student_weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "buckets": "communication",
    "gathered weights": "gathered",
    "activations": "activations",
    "loss": "loss",
    "[bold]total[/]": "total",
}
GIB_AT_MOST = {
    "gathered at most": "gather_peak",
    "student, checkpointed": "activations_checkpointed",
    "student, not so": "activations_not_checkpointed",
}
FLOPS = {
    "teacher": "teacher",
    "student": "student",
    "loss": "loss",
    "[bold]all[/]": "model",
    "recomputed": "recomputed",
}


def print_report(report: dict[str, Any]) -> None:
    """report: as launch/plan.py writes it to a file."""
    console, gpu, plans = Console(highlight=False, soft_wrap=True), report["gpu"], report["plans"]
    lines = [
        f"{report['recipe']} on {report['num_nodes']} x {report['gpus_per_node']} {gpu or 'GPUs'}",
        f"lengths: {report['lengths']}",
    ]
    console.print("\n".join(lines), markup=False)
    console.print(make_table(plans), soft_wrap=False)
    notes = [
        "GiB at the moment of a step that takes most: "
        f"{', '.join(_different(plans, 'gib_per_rank', 'moment'))}"
    ]
    notes += [
        "FLOPs: 2 m n k of each product, attention in full; what is recomputed is not in the sum, "
        "nor in MFU"
    ]
    if gpu is None:
        notes += ["--gpu KIND adds hours, and whether the run fits"]
    else:
        peak = f"{report['gpu_peak_tflops']:.0f} TFLOP/s"
        notes += [
            f"hours: of steps alone, at an MFU of {report['mfu']} of {peak} per GPU; stated, not "
            "measured"
        ]
        notes += [f"keep {plan['keep_fraction']} on {gpu}: {plan['verdict']}" for plan in plans]
    console.print("\n".join(notes), markup=False)


def make_table(plans: list[dict[str, Any]]) -> Table:
    """A column for each plan."""
    table = Table("", *(f"keep {plan['keep_fraction']}" for plan in plans))
    for column in table.columns[1:]:
        column.justify = "right"

    def add(title: str, values: list[Any], form: str) -> None:
        table.add_row(
            title, *("unknown" if value is None else format(value, form) for value in values)
        )

    def add_part(
        heading: str, rows: dict[str, str], part: str, form: str, unit: float = 1.0
    ) -> None:
        table.add_row(f"[italic]{heading}")
        for title, key in rows.items():
            add(title, [plan[part][key] / unit for plan in plans], form)
        table.add_section()

    add_part("GiB per rank", GIB_PER_RANK, "gib_per_rank", ".2f")
    add_part("GiB, each at most", GIB_AT_MOST, "gib_per_rank", ".2f")
    add_part("PFLOP per step", FLOPS, "flops_per_step", ".4g", 1e15)
    add("longest, tokens read", [plan["longest_sequence_tokens"] for plan in plans], ",")
    add("tokens per step", [plan["num_input_tokens_per_step"] for plan in plans], ",.0f")
    add("steps", [plan["num_steps"] for plan in plans], ",")
    add("tokens in all", [plan["num_input_tokens"] for plan in plans], ",.0f")
    add("hours", [plan["hours"] for plan in plans], ".2f")
    return table


def _different(plans: list[dict[str, Any]], part: str, key: str) -> list[str]:
    return list(dict.fromkeys(plan[part][key] for plan in plans))
