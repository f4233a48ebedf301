"""What a reader passes from a dataset row to the optimizer step, and how dense kd/ is, from its
source alone.

    python benchmarks/structure.py [--root CHECKOUT] [--entry FILE:NAME ...] [--json FILE]

Nothing is imported, so that any commit's tree can be read: `git worktree add /tmp/old COMMIT`, then
--root /tmp/old with the entries that it had.

The way of a batch is every function of kd/ that the entries reach. From a function one goes on to

- a function or class of kd that its body names, found through the imports of its file;
- self.NAME, in the same class;
- object.NAME, where a class that the file defines or imports has a method or property of that name
  and no built-in type has it: source alone does not say what object is.

A model that is called through an engine is not followed: name its class as an entry.

Entering a class passes the methods that Python or torch calls by themselves (CALLED_UNNAMED). Calls
through a table of functions are followed where the table's names stand in a function.
"""

import argparse
import ast
import io
import json
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = (
    "kd/data/tokenised.py:_tokenise_row",
    "kd/data/dataset.py:Examples",
    "kd/data/loader.py:Loader",
    "kd/training/step.py:train_step",
    "kd/models/student.py:StudentModule",
    "kd/teachers/live.py:LiveTeacher",
    "kd/teachers/live.py:TeacherModule",
)
LONG_LINES = 40
CALLED_UNNAMED = {
    "__init__",
    "__post_init__",
    "__call__",
    "__enter__",
    "__exit__",
    "__iter__",
    "__getitem__",
    "__len__",
    "forward",
    "backward",
}
BUILT_IN = {name for kind in (dict, list, set, str, bytes, tuple, int, Path) for name in dir(kind)}
BUILT_IN |= set(dir(io.TextIOWrapper))
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
NESTED = (
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
    ast.IfExp,
    ast.Lambda,
    ast.NamedExpr,
)

# ("kd/data/loader.py", "Loader.micro_batches")
Place = tuple[str, str]


@dataclass
class Source:
    """The functions and classes of kd/ by place, and what each file imports."""

    functions: dict[Place, ast.AST] = field(default_factory=dict)
    classes: dict[Place, list[str]] = field(default_factory=dict)  # names of the methods
    imports: dict[str, dict[str, str]] = field(default_factory=dict)  # file -> {name: dotted name}

    def find(self, file: str, name: str) -> Place | None:
        """Where a name that stands in a file is defined in kd, through re-exports."""
        if (file, name) in self.functions or (file, name) in self.classes:
            return file, name
        dotted = self.imports.get(file, {}).get(name)
        if dotted is None or not dotted.startswith("kd."):
            return None
        module, _, attribute = dotted.rpartition(".")
        path = module.replace(".", "/")
        for home in (f"{path}.py", f"{path}/__init__.py"):
            if home in self.imports and (home, attribute) != (file, name):
                return self.find(home, attribute)
        return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="a checkout of any commit")
    parser.add_argument(
        "--entry",
        action="append",
        metavar="FILE:NAME",
        help=f"where the way begins; may be repeated; {', '.join(ENTRIES)} when absent",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    figures = measure(arguments.root, arguments.entry or list(ENTRIES))
    for name, value in figures.items():
        shown = f"{len(value)}: {', '.join(value)}" if isinstance(value, list) else value
        print(f"{name.replace('_', ' '):<38}{shown}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure(root: Path, entries: list[str]) -> dict[str, object]:
    """All figures by name. Raises SystemExit for an entry that is not there."""
    trees, texts = {}, {}
    for path in sorted((root / "kd").rglob("*.py")):
        file = path.relative_to(root).as_posix()
        texts[file] = path.read_text(encoding="utf-8")
        trees[file] = ast.parse(texts[file])
    source = read_source(trees)
    passed = way(source, entries)
    lengths = {place: num_lines(node) for place, node in source.functions.items()}
    longest = max(lengths, key=lambda place: lengths[place])
    nodes = Counter(type(node) for tree in trees.values() for node in ast.walk(tree))
    num_statements = sum(count for kind, count in nodes.items() if issubclass(kind, ast.stmt))
    num_nested = sum(nodes[kind] for kind in NESTED)
    lines = [line for text in texts.values() for line in text.splitlines() if line.strip()]
    num_comments = sum(map(num_comment_lines, texts.values()))
    return {
        "files_passed": sorted({file for file, _ in passed}),
        "num_files_passed": len({file for file, _ in passed}),
        "num_functions_passed": len(passed),
        "num_lines_passed": sum(lengths[place] for place in passed),
        "longest_function": f"{longest[0]}:{longest[1]}, {lengths[longest]} lines",
        "num_functions": len(lengths),
        "num_functions_over_40_lines": sum(length > LONG_LINES for length in lengths.values()),
        "num_any": sum(map(num_any, trees.values())),
        "num_files": len(trees),
        "num_modules_at_root": sum(
            file.count("/") == 1 and not file.endswith("__init__.py") for file in trees
        ),
        "comment_lines_percent": round(100 * num_comments / len(lines), 2),
        "nested_expressions_per_100_statements": round(100 * num_nested / num_statements, 2),
    }


def read_source(trees: dict[str, ast.Module]) -> Source:
    source = Source()
    for file, tree in trees.items():
        source.imports[file] = dict(imported_names(tree))
        for node in tree.body:
            if isinstance(node, FUNCTIONS):
                source.functions[file, node.name] = node
            elif isinstance(node, ast.ClassDef):
                methods = [child for child in node.body if isinstance(child, FUNCTIONS)]
                source.classes[file, node.name] = [method.name for method in methods]
                for method in methods:
                    source.functions[file, f"{node.name}.{method.name}"] = method
    return source


def imported_names(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(name in the file, dotted name) of every import, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name, alias.name


def way(source: Source, entries: list[str]) -> set[Place]:
    """The functions that are reached from the entries, these among them."""
    waiting, passed = [], set()
    for entry in entries:
        file, _, name = entry.partition(":")
        if (file, name) not in source.functions and (file, name) not in source.classes:
            raise SystemExit(f"--entry {entry}: no such function or class; write FILE:NAME")
        waiting.append((file, name))
        # Of a class that is an entry, every public method is used.
        for method in source.classes.get((file, name), []):
            if not method.startswith("_"):
                waiting.append((file, f"{name}.{method}"))
    while waiting:
        place = waiting.pop()
        if place in source.classes:
            file, name = place
            unnamed = CALLED_UNNAMED & set(source.classes[place])
            waiting += [(file, f"{name}.{method}") for method in sorted(unnamed)]
        elif place not in passed:
            passed.add(place)
            waiting += next_places(source, place)
    return passed


def next_places(source: Source, place: Place) -> Iterator[Place]:
    file, name = place
    owner = name.rpartition(".")[0]
    for node in body_nodes(source.functions[place]):
        if isinstance(node, ast.Name) and (found := source.find(file, node.id)):
            yield found
        elif isinstance(node, ast.Attribute):
            yield from attribute_places(source, file, owner, node)


def attribute_places(source: Source, file: str, owner: str, node: ast.Attribute) -> Iterator[Place]:
    if isinstance(node.value, ast.Name) and node.value.id == "self":
        if (file, f"{owner}.{node.attr}") in source.functions:
            yield file, f"{owner}.{node.attr}"
        return
    module = source.imports[file].get(ast.unparse(node.value), "")
    if module.startswith("kd.") and (found := source.find(module_file(module), node.attr)):
        yield found
    elif node.attr not in BUILT_IN:
        for home, name in known_classes(source, file):
            if node.attr in source.classes[home, name]:
                yield home, f"{name}.{node.attr}"


def known_classes(source: Source, file: str) -> Iterator[Place]:
    """The classes of kd that a file defines or imports."""
    names = [name for home, name in source.classes if home == file]
    for name in [*names, *source.imports[file]]:
        found = source.find(file, name)
        if found in source.classes:
            yield found


def module_file(module: str) -> str:
    return f"{module.replace('.', '/')}.py"


def body_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a function's body: annotations and decorators are no step of the way."""
    assert isinstance(function, FUNCTIONS)
    waiting: list[ast.AST] = [*function.body, *function.args.defaults]
    while waiting:
        node = waiting.pop()
        yield node
        skipped = {id(getattr(node, part, None)) for part in ("annotation", "returns")}
        waiting += [child for child in ast.iter_child_nodes(node) if id(child) not in skipped]


def num_lines(function: ast.AST) -> int:
    assert isinstance(function, FUNCTIONS)
    return (function.end_lineno or function.lineno) - function.lineno + 1


def num_any(tree: ast.Module) -> int:
    """How often Any stands in annotations and elsewhere; imports of it are not counted."""
    return sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(tree))


def num_comment_lines(text: str) -> int:
    """Lines that hold a comment only."""
    lines = text.splitlines()
    comments = (
        token
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    )
    return sum(lines[token.start[0] - 1].lstrip().startswith("#") for token in comments)


if __name__ == "__main__":
    main()
