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
    "gathered, at most": "gather_peak",
    "student, checkpointed": "activations_checkpointed",
    "student, not checkpointed": "activations_not_checkpointed",
}
FLOPS = {
    "teacher": "teacher",
    "student": "student",
    "loss": "loss",
    "[bold]all[/]": "model",
    "recomputed": "recomputed",
    "sampling": "sampling",
}


# A step's time may be above its FLOPs, both relative to a longer one's, by so much.
MARGIN = 0.05
NUM_SHOWN = 5
REASONS = {
    "compute": "the work after the micro-batches",
    "gathers": "gathers, which take the same time at any length",
    "host": "the host, which has the same work for fewer tokens",
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
    notes = [f"GiB at the peak of a step: {', '.join(_different(plans, 'gib_per_rank', 'moment'))}"]
    notes += [
        "FLOPs: 2 m n k of each product, with full attention; neither the sum nor MFU counts what "
        "is recomputed"
    ]
    if report["cache"]:
        notes += [f"at keep {plans[-1]['keep_fraction']}, {report['cache']}"]
    if gpu is None:
        notes += ["--gpu KIND adds times, what bounds them, and whether the run fits"]
        console.print("\n".join(notes), markup=False)
        return
    notes += [
        f"times: planned, not measured, from the data sheet of {gpu}, {report['network_gbps']:g} "
        f"Gbit/s between nodes, {report['disk_gb_s']:g} GB/s to the disk, and host times measured "
        "on another machine (kd/plan/step_time.py)",
        *([report["choice"]] if report["choice"] else []),
        *(f"keep {plan['keep_fraction']} on {gpu}: {plan['verdict']}" for plan in plans),
        *idle_ranks(report),
        *warnings(report),
    ]
    console.print("\n".join(notes), markup=False)
    print_placements(console, report["placements"])


def idle_ranks(report: dict[str, Any]) -> list[str]:
    """A line for each plan in which ranks wait for others more than a tenth of the time."""
    return [
        f"keep {plan['keep_fraction']}: ranks wait {plan['idle_share']:.0%} of the time for the "
        "busiest one; to balance them, use fewer GPUs, a larger training.global_batch_size, or "
        "training.max_tokens_per_micro_batch"
        for plan in report["plans"]
        if plan["idle_share"] > 0.1
    ]


def warnings(report: dict[str, Any]) -> list[str]:
    """A line for each length whose time falls less than its FLOPs, relative to the longest plan,
    and what would help.
    """
    whole = max(report["plans"], key=lambda plan: plan["keep_fraction"])
    fastest = report["placements"]["rows"][0]
    lines = []
    for plan in report["plans"]:
        time = plan["seconds_per_step"] / whole["seconds_per_step"]
        flops = plan["flops_per_step"]["model"] / whole["flops_per_step"]["model"]
        if time > flops + MARGIN:
            remedy = f"; faster with {fastest['settings']}" if fastest["settings"] else ""
            lines.append(
                f"keep {plan['keep_fraction']} takes {flops:.0%} of the FLOPs of keep "
                f"{whole['keep_fraction']} but {time:.0%} of its time, bound by "
                f"{REASONS[plan['bound']]}{remedy}"
            )
    return lines


def print_placements(console: Console, placements: dict[str, Any]) -> None:
    """The fastest that fit, and the recipe's own."""
    lines = [f"\nplacements of the models, at keep {placements['keep_fraction']}, fastest first:"]
    for number, row in enumerate(placements["rows"]):
        if number < NUM_SHOWN or not row["settings"]:
            lines.append(
                f"{row['seconds_per_step']:.3f} s per step, MFU {row['mfu']:.2f}, bound by "
                f"{row['bound']}, {row['total_gib']:.1f} "
                f"GiB{'' if row['fits'] else ', does not fit'}: "
                f"{row['settings'] or 'the recipe as it is'}"
            )
    console.print("\n".join(lines), markup=False)


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
    add_part("GiB, at most", GIB_AT_MOST, "gib_per_rank", ".2f")
    add_part("PFLOPs per step", FLOPS, "flops_per_step", ".4g", 1e15)
    add("tokens read of the longest", [plan["longest_sequence_tokens"] for plan in plans], ",")
    add("tokens per step", [plan["num_input_tokens_per_step"] for plan in plans], ",.0f")
    add("steps", [plan["num_steps"] for plan in plans], ",")
    add("tokens in total", [plan["num_input_tokens"] for plan in plans], ",.0f")
    table.add_section()
    for name in ("compute", "gathers", "host", "after"):
        parts = [plan["seconds"] and plan["seconds"][name] for plan in plans]
        add(f"s per step, {name}", parts, ".3f")
    add("[bold]s per step[/]", [plan["seconds_per_step"] for plan in plans], ".3f")
    add("bound by", [plan["bound"] for plan in plans], "")
    add("MFU", [plan["mfu"] for plan in plans], ".2f")
    add("hours, all", [plan["hours"] for plan in plans], ".2f")
    for name in ("validation", "checkpoints"):
        shares = [plan["shares"] and plan["shares"][f"{name}_share"] for plan in plans]
        add(f"of them {name}", shares, ".1%")
    return table


def _different(plans: list[dict[str, Any]], part: str, key: str) -> list[str]:
    return list(dict.fromkeys(plan[part][key] for plan in plans))
