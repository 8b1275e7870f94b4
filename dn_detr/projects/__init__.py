"""Detectors that build on the library, one package each; the library imports none of them.

In a checkout they lie in its folder `projects`, and an installed library has them inside.
"""

from pathlib import Path as _Path

_checkout = _Path(__file__).resolve().parents[2]
if (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout / "projects"))
