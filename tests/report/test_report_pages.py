"""The report's folder: pages that show the numbers, links that lead to files, and nothing foreign
overwritten.
"""

import html.parser
import json
import re
from pathlib import Path
from urllib.parse import unquote

import forked
import pytest
from run_folders import PROBLEMS, step_record, write_run, write_study
from tiny import ROOT

from kd.constants import EXIT_USER_ERROR
from kd.errors import UserError
from kd.files import write_json
from kd.report import report_tables
from kd.report.blocks import Table
from kd.report.compare import compare
from kd.report.page import sections
from kd.report.read_runs import read_runs
from kd.report.render import escape_markdown, write_report

pytestmark = pytest.mark.slow

MINE = '{"kind": "of mine", "plots": []}'
VOID = {"meta", "img", "br"}


class Page(html.parser.HTMLParser):
    """Links, images and text of a page whose elements are properly nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.images: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.links += [values["href"]] if "href" in values else []
        self.images += [values["src"]] if "src" in values else []
        self.ids += [values["id"]] if "id" in values else []
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    return write_study(tmp_path_factory.mktemp("studies") / "a <study> & more #1")


@pytest.fixture(scope="module")
def report(study) -> Path:
    output = study.parents[1] / "report of it"
    write_report([study.parent], output)
    return output


@pytest.fixture(scope="module")
def page(report) -> Page:
    return Page((report / "index.html").read_text())


def test_the_page_is_one_file_without_scripts_or_network(page):
    assert "script" not in page.tags
    assert all(image.startswith("data:image/svg+xml;base64,") for image in page.images)
    assert len(page.images) == 7
    assert not [link for link in page.links if "//" in link]


def test_links_of_the_page_lead_to_files_of_runs(report, page, study):
    inside = [link for link in page.links if link.startswith("#")]
    assert {link[1:] for link in inside} <= set(page.ids)
    outside = {unquote(link) for link in page.links if not link.startswith("#")}
    assert all((report / link).is_file() and not link.startswith("/") for link in outside)
    names = {Path(link).name for link in outside}
    assert {
        "recipe.json",
        "metrics.jsonl",
        "student-after.json",
        "teacher.json",
        "study.json",
    } <= names


def test_links_of_the_markdown_lead_to_files(report):
    text = (report / "report.md").read_text()
    defined = dict(re.findall(r'^\[(r\d+)\]: (\S+) ".*"$', text, re.MULTILINE))
    assert set(re.findall(r"\]\[(r\d+)\]", text)) == set(defined)
    plots = re.findall(r"\]\((plots/[^)]*)\)", text)
    assert len(plots) == 2 * 7
    links = [unquote(link) for link in [*defined.values(), *plots]]
    assert all((report / link).is_file() and not link.startswith("/") for link in links)


def test_the_row_of_every_number_links_to_all_files_that_it_came_from(study):
    found = read_runs([study])
    families = compare(found.runs)
    blocks = [block for section in sections(families, found) for block in section.blocks]
    tables = [block for block in blocks if isinstance(block, Table)]
    num_linked = 0
    for table in tables:
        for row in table.rows:
            groups = table.files(row)
            named = {link.path for group in groups for link in (*group.files, *group.over)}
            numbers = [entry for entry in row if re.match(r"[\d.,e+-]+( |$)", entry.text)]
            for entry in numbers:
                assert {link.path for link in (*entry.sources, *entry.over)} <= named
                num_linked += bool(entry.sources)
            # Axes have no files; a table of files shows them in a cell of its own.
            assert not numbers or named or any(not entry.text for entry in row)
    assert num_linked > 100


def test_rows_of_the_page_and_the_markdown_hold_these_links(report):
    axes = ["prompt+cot+answer", "head", "0.5"]
    rows = re.findall(r"<tr>(<td.*?)</tr>", (report / "index.html").read_text())
    rows = [row for row in rows if re.findall(r">([^<>]+)</td>", row)[:3] == axes]
    lines = (report / "report.md").read_text().splitlines()
    lines = [line for line in lines if line.startswith(f"| {' | '.join(axes)} |")]
    assert len(rows) == len(lines) == 2  # accuracy, costs
    labels = ["s0", "s1", "s2"] * 2  # the second three are whole sequences
    for row, line in zip(rows, lines, strict=True):
        assert re.findall(r"<a [^>]*>(\w+)</a>", row) == labels
        assert re.findall(r"\[(\w+)\]\[r\d+\]", line) == labels


def test_the_answer_is_first_and_what_qualifies_it_is_next_to_it(tmp_path):
    for keep_fraction, number in ((0.5, 90), (1.0, 95)):
        changes = {"training__learning_rate": keep_fraction, "num_correct": number}
        write_run(tmp_path / f"keep{keep_fraction}", keep_fraction=keep_fraction, **changes)
    write_report([tmp_path], tmp_path / "report")
    (comparison,) = json.loads((tmp_path / "report" / "report.json").read_text())["comparisons"]
    (answer,) = comparison["answers"]
    assert (answer["keep_fraction"], answer["kept"], answer["kept_ci95"][1] > 1) == (
        0.5,
        0.9 / 0.95,
        True,
    )
    assert answer["knee"]["keep_fraction"] == 0.5
    assert [difference["name"] for difference in answer["differences"]] == [
        "training.learning_rate"
    ]
    for name in ("index.html", "report.md"):
        text = (tmp_path / "report" / name).read_text()
        picture = "<img" if name == "index.html" else "![kept]"
        places = [
            text.index(part)
            for part in (
                answer["text"],
                "Warning: ",
                "learning_rate (0.5 in 1 run; 1.0",
                picture,
                "What was read",
            )
        ]
        assert places == sorted(places)


def test_a_damaged_run_is_a_warning_above_everything(tmp_path):
    write_run(tmp_path / "a", num_correct=50)
    (write_run(tmp_path / "b", seed=1, num_correct=50) / "recipe.json").write_text("{")
    write_report([tmp_path], tmp_path / "report")
    text = Page((tmp_path / "report" / "index.html").read_text()).text
    assert 0 < text.index("1 damaged run or file") < text.index("What was read")


def test_pages_and_json_hold_the_same_numbers(report, page):
    found = json.loads((report / "report.json").read_text())
    (comparison,) = found["comparisons"]
    shown = (report / "report.md").read_text()
    for cell in comparison["cells"]:
        (score,) = cell["scores"].values()
        for text in (
            f"{score['accuracy']:.3f}",
            "{:.3f}-{:.3f}".format(*score["ci95"]),
            f"{cell['costs']['flops']:.3g}",
        ):
            assert text in page.text
            assert text in shown
    assert {knee["keep_fraction"] for knee in comparison["knees"]} == {0.75, 1.0}
    assert len(found["runs"]) == 19
    assert [cell["status"] for cell in found["not_done"]] == ["no_supervised_token", "pending"]


def test_what_is_not_compared_is_told(page):
    assert "not finished (no SUCCESS) after step 200" in page.text
    assert "no_supervised_token: data.loss_sections: no token of an answer is kept" in page.text
    assert ": prompt+cot, head; cot, head; prompt, head." in page.text
    assert "1 unfinished run, 2 cells of studies" in page.text


def test_names_are_escaped(tmp_path):
    name = '<b>"a" & |b|_ *c* [d](e) #f%20'
    write_run(tmp_path / name, num_correct=50)
    write_run(
        tmp_path / "plain", keep_fraction=0.5, num_correct=40, student__model="models/student"
    )
    write_report([tmp_path], tmp_path / "report")
    page = Page((tmp_path / "report" / "index.html").read_text())
    assert "b" not in page.tags
    assert name in page.text
    links = [link for link in page.links if not link.startswith("#")]
    assert all((tmp_path / "report" / unquote(link)).is_file() for link in links)
    text = (tmp_path / "report" / "report.md").read_text()
    assert r"\<b\>\"a\" \& \|b\|\_ \*c\* \[d\](e) #f%20" in text
    assert re.search(r"^\[r\d+\]: \S*%3Cb%3E%22a%22%20%26\S* ", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("keep_fraction", "keep_fraction"),
        ("_a_", r"\_a\_"),
        ("# a", r"\# a"),
        ("1. a", r"\1. a"),
        ("a\nb", "a b"),
    ],
)
def test_markdown_of_plain_text_is_plain_text(text, escaped):
    assert escape_markdown(text) == escaped


def test_runs_of_an_earlier_version_without_flops_diagnostics_or_evaluation(tmp_path):
    run = write_run(tmp_path / "old", keep_fraction=0.5)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["flops"], line["diagnostics"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "environment.json").unlink()
    write_report([run], tmp_path / "report")
    text = (tmp_path / "report" / "index.html").read_text()
    assert "What a length keeps is not known: no run is evaluated." in text
    assert "1 run without an evaluation" in text
    assert text.count("not recorded") >= 3


def test_a_warning_says_what_differs_between_runs_that_are_compared(tmp_path):
    write_run(tmp_path / "a", num_correct=50)
    write_run(tmp_path / "b", seed=1, num_correct=50, training__learning_rate=0.5)
    write_report([tmp_path], tmp_path / "report")
    page = Page((tmp_path / "report" / "index.html").read_text())
    assert re.search(
        r"Warning: these runs differ.*training.learning_rate\s*0.0001\s*a",
        page.text,
        re.DOTALL,
    )


def test_a_run_that_never_took_a_step_is_listed(tmp_path):
    write_report([write_run(tmp_path / "a", steps=[])], tmp_path / "report")
    assert "after step 0" in (tmp_path / "report" / "report.md").read_text()


def test_only_unfinished_runs_make_a_report_without_a_comparison(tmp_path):
    write_report([write_run(tmp_path / "a", finished=False)], tmp_path / "report")
    assert json.loads((tmp_path / "report" / "report.json").read_text())["comparisons"] == []


def test_a_row_of_plots_for_each_task(tmp_path):
    run = write_run(tmp_path / "a", num_correct=50)
    second = json.loads((run / "evaluation" / "student-after.json").read_text()) | {
        "task": "aime24"
    }
    (run / "evaluation" / "after.aime24.json").write_text(json.dumps(second))
    write_report([run], tmp_path / "report")
    page = Page((tmp_path / "report" / "index.html").read_text())
    assert "Accuracy: aime24" in page.text
    assert len(list((tmp_path / "report" / "plots").glob("*_accuracy.svg"))) == 2


def test_an_earlier_report_is_replaced_with_its_plots_and_nothing_else(tmp_path):
    run = write_run(tmp_path / "runs" / "a", num_correct=50)
    output = tmp_path / "report"
    write_report([write_study(tmp_path / "study")], output)
    (output / "mine.txt").write_text("kept")
    (output / "plots" / "mine.png").write_text("kept")
    write_report([run], output)
    assert (
        (output / "mine.txt").read_text() == (output / "plots" / "mine.png").read_text() == "kept"
    )
    listed = json.loads((output / "report.json").read_text())["plots"]
    assert {path.name for path in (output / "plots").iterdir()} == {*listed, "mine.png"}


@pytest.mark.parametrize("name", ["report.json", "index.html", "file"])
def test_a_folder_that_is_no_report_is_left_alone(tmp_path, name):
    run = write_run(tmp_path / "a", num_correct=50)
    output = tmp_path / "output"
    output.mkdir()
    (output / name).write_text(MINE)
    with pytest.raises(UserError, match="--output = .*holds no earlier report.*name a new folder"):
        write_report([run], output)
    assert [(path.name, path.read_text()) for path in output.iterdir()] == [(name, MINE)]
    with pytest.raises(UserError, match="--output = "):
        write_report([run], output / name)


def test_the_same_runs_make_the_same_report(tmp_path):
    run = write_run(tmp_path / "a", num_correct=50)
    for name in ("one", "two"):
        write_report([run], tmp_path / name)
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("one", "two")
    ]
    assert files[0] == files[1]


@pytest.mark.process
def test_the_command_says_in_one_block_what_is_wrong(tmp_path):
    command = [ROOT / "launch" / "report.py", tmp_path, "-o", tmp_path / "report"]
    done = forked.run(command, timeout=120)
    assert done.returncode == EXIT_USER_ERROR
    assert done.stderr.strip().startswith(f"error: RUNS = '{tmp_path}': no run is there")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "report").exists()


def test_runs_that_read_a_cache_are_told_with_what_a_teacher_in_each_had_cost(tmp_path: Path):
    steps = [step_record(1, flops=6e12, flops_spared=5e12)]
    for seed in (0, 1):
        folder = tmp_path / "study" / f"run{seed}"
        write_run(folder, seed=seed, steps=steps, teacher__cache="elsewhere/study/cache")
    filled = {"num_rows": 2, "num_tokens": 2048, "bytes": 2**30, "rank_seconds": 90.0}
    write_json(tmp_path / "study" / "cache" / "filled.json", filled | {"flops": 8e12})
    (family,) = compare(read_runs([tmp_path / "study"]).runs)
    table = report_tables.caches(family)
    texts = dict(zip(table.header, [entry.text for entry in table.rows[0]], strict=True))
    assert texts == {
        "cache": "",
        "tokens": "2,048",
        "GiB": "1.00",
        "rank minutes to fill": "1.5",
        "FLOPs to fill": "8e+12",
        "runs that read it": "2",
        "FLOPs of all": "2e+13",  # 8 + 2 * 6
        "with a teacher in each": "2.2e+13",  # 2 * (6 + 5)
        "ratio": "0.909",
        "pays from": "2 runs",  # 8 / 5, rounded up
    }
    assert table.rows[0][0].sources[0].path == tmp_path / "study" / "cache" / "filled.json"


def test_runs_with_a_live_teacher_have_no_table_of_caches(tmp_path: Path):
    write_run(tmp_path / "run")
    (family,) = compare(read_runs([tmp_path]).runs)
    assert report_tables.caches(family) is None


def test_adapters_are_a_row_of_their_own_and_no_difference(tmp_path: Path):
    lora = {"rank": 16, "alpha": 32.0, "dropout": 0.0, "target_modules": "all-linear"}
    write_run(tmp_path / "student", num_correct=90)
    write_run(tmp_path / "adapters", num_correct=80, student__lora=lora)
    (family,) = compare(read_runs([tmp_path]).runs)
    accuracies = {str(cell.variant): cell.scores[PROBLEMS].accuracy for cell in family.cells}
    whole = "prompt+cot+answer, head"
    assert accuracies == {whole: 0.9, f"{whole}, LoRA of rank 16, alpha 32": 0.8}
    assert not [difference for difference in family.differences if "lora" in difference.name]


def test_rollouts_are_a_row_of_their_own_with_what_sampling_took(tmp_path: Path):
    rollout = {"fraction": 0.5, "source": "student", "max_new_tokens": 16, "temperature": 1.0}
    write_run(tmp_path / "data")
    steps = [step_record(1, flops_of_sampling=2e11)]
    write_run(tmp_path / "sampled", steps=steps, rollout=rollout | {"top_p": 0.9})
    (family,) = compare(read_runs([tmp_path]).runs)
    whole = "prompt+cot+answer, head"
    sampled = f"{whole}, 0.5 sampled by student, 16 tokens, top_p 0.9"
    assert [str(cell.variant) for cell in family.cells] == [whole, sampled]
    assert not [difference for difference in family.differences if "rollout" in difference.name]
    assert report_tables.costs(family).rows[1][-1].text.startswith("2e+11")
