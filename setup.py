"""Maps the folders of the repository to packages; everything else is in pyproject.toml.

`configs/` and `tools/` lie beside the library, where people look for them, and are installed as
`dn_detr.configs` and `dn_detr.tools`, so that a wheel holds the zoo and the console command. The
configs are read as files, never imported by name, and have no `__init__.py`; `tools/` has one,
because an editable installation finds no namespace package inside a package.
"""

from pathlib import Path

from setuptools import setup

PACKAGE_FOLDERS = {"dn_detr": "dn_detr", "dn_detr.configs": "configs", "dn_detr.tools": "tools"}


def packages_below(name: str, folder: str) -> list[str]:
    """Every folder that holds Python files, with or without an `__init__.py`, as a package."""
    root = Path(__file__).parent / folder
    parents = {path.parent.relative_to(root).parts for path in root.rglob("*.py")}
    return sorted(".".join((name, *parts)) for parts in parents)


setup(
    packages=[
        package
        for name, folder in PACKAGE_FOLDERS.items()
        for package in packages_below(name, folder)
    ],
    package_dir=PACKAGE_FOLDERS,
    package_data={"dn_detr": ["py.typed"]},
)
