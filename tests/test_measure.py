"""What `tests.measure` counts, on small files."""

from __future__ import annotations

from textwrap import dedent

from tests.measure import measure_file


def _measure(source: str):
    return measure_file(dedent(source).lstrip("\n"))


def test_docstrings_comments_and_blank_lines_are_no_code():
    counts = _measure('''
        """A page
        of words."""

        # a comment
        TEXT = """two
        lines"""  # and a comment behind code


        def double(x):
            """Twice x."""
            return 2 * x
        ''')
    assert (counts.lines, counts.code) == (11, 4)


def test_private_function_counts_if_one_place_calls_it():
    counts = _measure("""
        def _once(): ...
        def _twice(): ...
        def _never(): ...
        def public(self):
            _once()
            _twice()
            self._twice()
            self.__private__()
        def __private__(self): ...
        """)
    assert (counts.once, len(counts.functions)) == (1, 5)


def test_function_is_typed_if_all_its_parameters_and_its_result_are():
    counts = _measure("""
        def typed(self, a: int, *, b: str = "") -> None: ...
        def untyped(a, b: int) -> None: ...
        def without_result(a: int): ...
        """)
    assert counts.typed == 1


def test_shapes_are_looked_for_in_public_functions_of_tensors():
    counts = _measure('''
        def shaped(x: Tensor) -> list[Tensor]:
            """Args: x: Boxes, (B, Q, 4)."""
        def shapeless(x: Tensor) -> None:
            """Args: x: Boxes (of images)."""
        def _private(x: Tensor) -> None: ...
        def other(x: int) -> None: ...
        ''')
    assert (counts.tensor, counts.shaped) == (2, 1)
