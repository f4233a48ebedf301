"""How many rows were kept and dropped, and why: str() of a DataReport is the text to log."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ReadReport:
    """The rows of one file or hub dataset, before any filter."""

    name: str
    num_rows: int
    num_other_task: int
    bad_rows: dict[str, int]  # reason -> rows


@dataclass(frozen=True)
class FileReport:
    read: ReadReport
    max_full_tokens: int | None
    num_too_long: int
    num_taken: int | None = None  # of the usable ones, by data.sources; None: all

    def __str__(self) -> str:
        read = self.read
        dropped = {"of another task": read.num_other_task, **read.bad_rows}
        dropped[f"longer than truncation.max_full_tokens = {self.max_full_tokens}"] = (
            self.num_too_long
        )
        lines = [
            f"{read.name}: {read.num_rows} rows, {read.num_rows - sum(dropped.values())} usable"
        ]
        lines += [f"  dropped {count}: {reason}" for reason, count in dropped.items() if count]
        if self.num_taken is not None:
            lines.append(f"  drawn for the mixture: {self.num_taken} rows")
        return "\n".join(lines)


@dataclass(frozen=True)
class SplitReport:
    num_examples: int
    num_without_label: int  # dropped: truncation left no supervised token
    num_full_tokens: int
    num_input_tokens: int
    num_supervised_tokens: int
    by_source: dict[str, "SplitReport"] = field(default_factory=dict)  # where there are several

    def __str__(self) -> str:
        whole = self._line()
        parts = [f"  {name}: {part._line()}" for name, part in self.by_source.items()]
        return "\n".join([whole, *parts])

    def _line(self) -> str:
        share = self.num_input_tokens / max(self.num_full_tokens, 1)
        return (
            f"{self.num_examples} examples, {self.num_input_tokens} of {self.num_full_tokens} "
            f"tokens read ({share:.3f}), {self.num_supervised_tokens} supervised; "
            f"{self.num_without_label} dropped without a label"
        )


@dataclass(frozen=True)
class DataReport:
    files: tuple[FileReport, ...]
    train: SplitReport
    validation: SplitReport | None
    num_shared_prompts: int = 0  # training rows whose prompt is also that of a validation row
    num_excluded: int = 0  # such rows that data.exclude_validation_prompts left out

    def __str__(self) -> str:
        lines = [*map(str, self.files), f"train: {self.train}"]
        if self.validation:
            lines.append(f"validation: {self.validation}")
        if self.num_excluded:
            lines.append(
                f"left out of training: {self.num_excluded} rows that share their prompt with a "
                "validation row"
            )
        if self.num_shared_prompts:
            lines.append(
                f"warning: {self.num_shared_prompts} training rows share their prompt with a "
                "validation row, so the validation loss will be too low: set "
                "data.exclude_validation_prompts = true to drop them"
            )
        return "\n".join(lines)
