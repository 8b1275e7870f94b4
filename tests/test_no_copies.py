"""Model code exists once: no run of six equal lines in two places of models, configs and projects.

Lines are compared without indentation; blank lines and imports do not count. Documentation does:
it is what goes stale first. Within a file signatures do not count, because layers of one kind take
the same arguments.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN = 6

Place = tuple[str, int]  # file and line number


def _counted_lines(source: str) -> list[tuple[int, str]]:
    """Number and stripped text of the lines that are compared."""
    imported: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    numbered = enumerate(map(str.strip, source.splitlines()), start=1)
    return [(number, line) for number, line in numbered if line and number not in imported]


def _without_signatures(source: str) -> list[tuple[int, str]]:
    """The same, but no two lines of signatures are alike."""
    signatures: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            signatures.update(range(node.lineno, node.body[0].lineno))
    return [(n, f"line {n}" if n in signatures else line) for n, line in _counted_lines(source)]


def find_copies(sources: Mapping[str, str]) -> list[tuple[Place, Place]]:
    """Where each pair of equal runs of `RUN` or more lines, which do not overlap, begins."""
    everywhere = _equal_runs({name: _counted_lines(source) for name, source in sources.items()})
    between = [(first, second) for first, second in everywhere if first[0] != second[0]]
    within = [_equal_runs({n: _without_signatures(source)}) for n, source in sources.items()]
    return sum(within, between)


def _equal_runs(counted: Mapping[str, list[tuple[int, str]]]) -> list[tuple[Place, Place]]:
    places = defaultdict(list)
    for name, lines in counted.items():
        for start in range(len(lines) - RUN + 1):
            places[tuple(text for _, text in lines[start : start + RUN])].append((name, start))
    pairs = {
        (first, second)
        for equal in places.values()
        for first, second in combinations(equal, 2)
        if first[0] != second[0] or second[1] - first[1] >= RUN
    }
    begins = [
        ((a, i), (b, j))
        for (a, i), (b, j) in sorted(pairs)
        if ((a, i - 1), (b, j - 1)) not in pairs
    ]
    return [((a, counted[a][i][0]), (b, counted[b][j][0])) for (a, i), (b, j) in begins]


def _block(name: str, length: int) -> str:
    return "".join(f"{name}_{i} = {i}\n" for i in range(length))


def test_run_of_six_lines_in_two_files_is_found():
    copied = _block("copied", 8)
    indented = "def f():\n" + "".join(f"    {line}\n\n" for line in copied.splitlines())
    found = find_copies({"a.py": _block("a", 3) + copied, "b.py": indented})
    assert found == [(("a.py", 4), ("b.py", 2))]


def test_run_of_six_lines_within_a_file_is_found():
    source = _block("copied", 6) + _block("other", 2) + _block("copied", 6)
    assert find_copies({"a.py": source}) == [(("a.py", 1), ("a.py", 9))]


def _function(name: str, body: str) -> str:
    arguments = "".join(f"    argument{i},\n" for i in range(9))
    return f"def {name}(\n{arguments}):\n    return {body}\n"


def test_equal_signatures_are_copies_between_files_only():
    one, other = _function("one", "1"), _function("other", "2")
    assert find_copies({"a.py": one + other}) == []
    assert find_copies({"a.py": one, "b.py": other}) == [(("a.py", 2), ("b.py", 2))]


def test_five_equal_lines_are_no_copy():
    copied = _block("copied", 5)
    assert find_copies({"a.py": copied + "a = 0\n", "b.py": copied + "b = 0\n"}) == []


def test_equal_imports_are_no_copy():
    imports = "from module import (\n" + "".join(f"    name{i},\n" for i in range(9)) + ")\n"
    assert find_copies({"a.py": imports + "a = 0\n", "b.py": imports + "b = 0\n"}) == []


def test_no_model_code_exists_twice():
    files = [
        path
        for folder in ("dn_detr/modeling", "configs/models", "projects")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    assert len(files) > 10
    copies = find_copies({str(path.relative_to(ROOT)): path.read_text() for path in files})
    assert not copies, "\n".join(f"{a}:{i} = {b}:{j}" for (a, i), (b, j) in copies)
