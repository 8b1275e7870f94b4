"""Print how large the library is and how it is cut up: `python -m tests.measure [FOLDER ...]`.

FOLDER is a checkout of this repository (default: the one that this file is in); with several, the
table has a column for each, so that two commits can be compared:

    git worktree add ../before bb4072c
    python -m tests.measure ../before .

What is counted:

- Lines of code are lines that hold a token which is neither a comment nor part of a docstring.
- A function is every `def`, nested ones and methods too; its length is all its lines.
- A private function has a name with one leading underscore (`__init__` and the like have two). It
  is called from one place if its name occurs exactly once in its file beside its definitions.
- A function is typed if each parameter but `self` and `cls`, and the result, has a type.
- A tensor function is a public one with a `Tensor` in its types; its docstring has a shape if it
  has parentheses with a dimension in them, such as `(B, Q, 4)` or `(..., 4)`.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import statistics
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
Function = ast.FunctionDef | ast.AsyncFunctionDef

_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
_SHAPE = re.compile(r"\((?:\.\.\.|[A-Z0-9]\w*)(?:, [^()]*)?\)|\bscalar\b")


@dataclass
class File:
    """The counts of one Python file.

    Attributes:
        lines: All its lines.
        code: Its lines of code.
        functions: The length of each function, in lines.
        once: Number of private functions that are called from one place.
        typed: Number of functions with full type hints.
        tensor: Number of public functions with a tensor in their types.
        shaped: Number of those whose docstring has a shape.
    """

    lines: int = 0
    code: int = 0
    functions: list[int] = field(default_factory=list)
    once: int = 0
    typed: int = 0
    tensor: int = 0
    shaped: int = 0


def measure_file(source: str) -> File:
    """Count the lines and functions of the text of a Python file."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
    named = Counter(function.name for function in functions)
    uses = _uses(tree)
    return File(
        lines=len(source.splitlines()),
        code=len(_code_lines(source, tree)),
        functions=[(f.end_lineno or f.lineno) - f.lineno + 1 for f in functions],
        once=sum(n for name, n in named.items() if _is_private(name) and uses[name] == 1),
        typed=sum(map(_is_typed, functions)),
        tensor=sum(map(_takes_tensors, functions)),
        shaped=sum(_takes_tensors(f) and _has_shape(f) for f in functions),
    )


def measure_folder(folder: Path) -> dict[str, list[File]]:
    """Measure the Python files below a folder, by its subfolders; `.` has those beside them."""
    packages: dict[str, list[File]] = {}
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder).parts
        counts = measure_file(path.read_text(encoding="utf-8"))
        packages.setdefault(inside[0] if len(inside) > 1 else ".", []).append(counts)
    return packages


def _code_lines(source: str, tree: ast.Module) -> set[int]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            docstrings.update(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _LAYOUT and token.string:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - docstrings


def _uses(tree: ast.Module) -> Counter[str]:
    """How often each name occurs, alone or after a dot; where it is defined does not count."""
    uses: Counter[str] = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            uses[node.id] += 1
        elif isinstance(node, ast.Attribute):
            uses[node.attr] += 1
    return uses


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _parameters(function: Function) -> list[ast.arg]:
    a = function.args
    every = [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]
    return [p for p in every if p is not None and p.arg not in ("self", "cls")]


def _is_typed(function: Function) -> bool:
    return function.returns is not None and all(p.annotation for p in _parameters(function))


def _takes_tensors(function: Function) -> bool:
    types = [function.returns, *(p.annotation for p in _parameters(function))]
    return not function.name.startswith("_") and any(
        isinstance(node, ast.Name) and node.id == "Tensor"
        for annotation in types
        if annotation is not None
        for node in ast.walk(annotation)
    )


def _has_shape(function: Function) -> bool:
    return bool(_SHAPE.search(ast.get_docstring(function) or ""))


def _count(packages: dict[str, list[File]], names: Iterable[str]) -> str:
    files = [file for name in names for file in packages.get(name, [])]
    return f"{sum(f.code for f in files):,} / {sum(f.lines for f in files):,}"


def _share(part: int, whole: int) -> str:
    return f"{part / max(whole, 1):.0%} ({part:,} of {whole:,})"


def table(checkouts: Sequence[Path]) -> list[list[str]]:
    """Return the rows of the table, each the name of a figure and its value in each checkout."""
    columns = [measure_folder(checkout / "dn_detr") for checkout in checkouts]
    names = sorted({name for packages in columns for name in packages})

    def row(name: str, value: Callable[[dict[str, list[File]]], str]) -> list[str]:
        return [name, *(value(packages) for packages in columns)]

    def of_files(value: Callable[[list[File]], str]) -> Callable[[dict[str, list[File]]], str]:
        return lambda packages: value([f for files in packages.values() for f in files])

    rows = [row("dn_detr/, lines of code / all lines", lambda p: _count(p, p))]
    rows += [row(f"- {name}", lambda p, name=name: _count(p, [name])) for name in names]
    rows += [
        row("engine + checkpoint", lambda p: _count(p, ["engine", "checkpoint"])),
        row("files", of_files(lambda files: f"{len(files)}")),
        row("largest file, lines", of_files(lambda files: f"{max(f.lines for f in files)}")),
        row("functions", of_files(lambda files: f"{sum(len(f.functions) for f in files):,}")),
        row("median / 90 % / largest function, lines", of_files(_lengths)),
        row(
            "private functions called from one place",
            of_files(lambda fs: _share(sum(f.once for f in fs), sum(len(f.functions) for f in fs))),
        ),
        row(
            "functions with full type hints",
            of_files(
                lambda fs: _share(sum(f.typed for f in fs), sum(len(f.functions) for f in fs))
            ),
        ),
        row(
            "tensor functions whose docstring has a shape",
            of_files(lambda fs: _share(sum(f.shaped for f in fs), sum(f.tensor for f in fs))),
        ),
    ]
    for name in ("configs", "tools", "tests"):
        other = [measure_folder(checkout / name) for checkout in checkouts]
        rows.append([f"{name}/, lines of code / all lines", *(_count(p, p) for p in other)])
    return rows


def _lengths(files: list[File]) -> str:
    lengths = sorted(length for file in files for length in file.functions)
    nine_tenths = lengths[int(0.9 * len(lengths))]
    return f"{statistics.median(lengths):.0f} / {nine_tenths} / {lengths[-1]}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, default=[ROOT], metavar="FOLDER")
    checkouts = parser.parse_args(arguments).folders
    header = ["", *(str(checkout) for checkout in checkouts)]
    for cells in [header, ["---"] * len(header), *table(checkouts)]:
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
