"""The report's folder: index.html in one file, report.md with its plots next to it, and report.json
with all numbers.
"""

import base64
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import jinja2
import matplotlib
from matplotlib.figure import Figure

from kd.errors import UserError
from kd.files import write_json, write_text
from kd.report import plots
from kd.report.blocks import Plot
from kd.report.compare import Family, compare
from kd.report.numbers import numbers
from kd.report.page import answer_sections, sections
from kd.report.read_runs import RunsRead, read_runs

TITLE = "Truncated traces: accuracy kept, cost saved"
KIND = "distill-trunc report"
PLOTS = "plots"
TEMPLATES = Path(__file__).with_name("templates")


def write_report(roots: Sequence[Path], output: Path) -> None:
    """Read all runs at or below the roots and write the report into the folder `output`.

    A run with a damaged file is named and left out. Raises UserError for a root without runs, and
    for an output folder that holds anything but a report.
    """
    stale = _plots_of_earlier(output)
    found = read_runs(roots)
    families = compare(found.runs)
    try:
        (output / PLOTS).mkdir(parents=True, exist_ok=True)
        for name in stale:
            (output / PLOTS / name).unlink(missing_ok=True)
        _write(families, found, output)
    except OSError as error:
        raise UserError(f"--output = {str(output)!r}: cannot write there: {error}") from error


def _plots_of_earlier(output: Path) -> list[str]:
    """The plots of the report that the folder holds; none when it is empty or absent."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return []
    try:
        earlier = json.loads((output / "report.json").read_text(encoding="utf-8"))
        if earlier["kind"] == KIND:
            return [Path(name).name for name in earlier["plots"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f"--output = {str(output)!r} exists and holds no earlier report, so nothing in it was "
        "overwritten: name a new folder, or an empty one"
    )


def _write(families: Sequence[Family], found: RunsRead, output: Path) -> None:
    with matplotlib.rc_context(plots.STYLE):
        first, rest = answer_sections(families, found), sections(families, found)
        drawn = [
            block
            for section in [*first, *rest]
            for block in section.blocks
            if isinstance(block, Plot)
        ]
        names = {plot: f"{index:02}_{plot.name}" for index, plot in enumerate(drawn, start=1)}
        images = {plot: _image(plot.figure, "svg") for plot in drawn}
        files = {f"{names[plot]}.svg": image for plot, image in images.items()}
        files |= {f"{name}.png": _image(plot.figure, "png") for plot, name in names.items()}
    for name, image in files.items():
        (output / PLOTS / name).write_bytes(image)
    # First of the three: by it a later report knows that the folder is a report's.
    write_json(
        output / "report.json",
        {"kind": KIND, "plots": sorted(files), **numbers(families, found, output)},
    )
    jinja = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=lambda name: name == "index.html.j2",
        undefined=jinja2.StrictUndefined,
    )
    jinja.filters["href"] = lambda path: href(path, output)
    jinja.filters["md"] = escape_markdown
    jinja.filters["file"] = lambda plot: f"{PLOTS}/{names[plot]}"
    jinja.filters["image"] = lambda plot: (
        f"data:image/svg+xml;base64,{base64.b64encode(images[plot]).decode()}"
    )
    # Of the Markdown's links, in the order in which they are met
    references: dict[tuple[str, Path], str] = {}
    jinja.filters["ref"] = lambda link: references.setdefault(
        (link.title, link.path), f"r{len(references) + 1}"
    )
    jinja.globals["references"] = references.items
    for name in ("report.md", "index.html"):
        write_text(
            output / name,
            jinja.get_template(f"{name}.j2").render(title=TITLE, answers=first, sections=rest),
        )


def href(path: Path, output: Path) -> str:
    """A relative link from a file in `output`, percent-encoded."""
    return quote(os.path.relpath(path.resolve(), output.resolve()))


def escape_markdown(text: str) -> str:
    """The text as Markdown shows it in a line, a cell of a table, or the title of a link."""
    escaped = re.sub(r"([\\`*\[\]<>|~$&\"]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))
    return re.sub(r"^([#+-]|\d+\.)(?=\s)", r"\\\1", escaped)


def _image(figure: Figure, kind: str) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return file.getvalue()
