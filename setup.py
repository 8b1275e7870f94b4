"""Maps the folders of the repository to packages and builds the compiled operators.

`configs/` and `tools/` lie beside the library, where people look for them, and are installed as
`dn_detr.configs` and `dn_detr.tools`, so that a wheel holds the zoo and the console command. The
configs are read as files, never imported by name, and have no `__init__.py`; `tools/` has one,
because an editable installation finds no namespace package inside a package.

The operators use LibTorch's stable ABI, so one shared library serves torch 2.11 and later and every
Python. Torch's headers come from the torch that runs this file: install with
`pip install --no-build-isolation`. Without torch or a compiler the installation succeeds with a
warning, and dn_detr.ops computes in plain PyTorch.
"""

import importlib.util
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
PACKAGE_FOLDERS = {"dn_detr": "dn_detr", "dn_detr.configs": "configs", "dn_detr.tools": "tools"}

CPU_SOURCES = [
    "csrc/registration.cpp",
    "csrc/ms_deform_attn/cpu.cpp",
    "csrc/ms_deform_attn/cpu_portable.cpp",
    "csrc/ms_deform_attn/cpu_avx2.cpp",
    "csrc/ms_deform_attn/cpu_avx512.cpp",
]
COMPILER_OPTIONS = [
    "-std=c++17",
    "-O3",
    "-g0",  # Python asks for debug information, which doubles the time
    "-ffp-contract=fast",  # a * b + c rounds once where the processor can
    "-fvisibility=hidden",
    "-Wno-psabi",  # vectors are passed between functions of one file only
    "-Wno-ignored-attributes",
]
OLDEST_TORCH = "0x020b000000000000"  # 2.11: the oldest version whose ABI the library relies on


def packages_below(name: str, folder: str) -> list[str]:
    """Every folder that holds Python files, with or without an `__init__.py`, as a package."""
    root = ROOT / folder
    parents = {path.parent.relative_to(root).parts for path in root.rglob("*.py")}
    return sorted(".".join((name, *parts)) for parts in parents)


def torch_folder() -> Path | None:
    """Where torch is installed; found without importing it, which takes seconds."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def operators() -> list[Extension]:
    """The extension module `dn_detr._C`, which Python loads as a library, not as a module."""
    torch = torch_folder()
    if torch is None:
        warn("torch is not installed here (try pip install --no-build-isolation)")
        return []
    return [
        Extension(
            "dn_detr._C",
            sources=CPU_SOURCES,
            depends=[str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*.h"))],
            include_dirs=[str(torch / "include")],
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu"],
            define_macros=[("TORCH_TARGET_VERSION", OLDEST_TORCH)],
            extra_compile_args=COMPILER_OPTIONS,
            language="c++",
            optional=True,
        )
    ]


def warn(reason: str) -> None:
    """Tells that the operators are missing; the installation goes on."""
    print(f"warning: dn_detr's compiled operators are not built: {reason}", file=sys.stderr)


class BuildOperators(build_ext):
    """Compiles sources side by side; without a working compiler it only warns."""

    def get_ext_filename(self, ext_name: str) -> str:
        # No Python version in the name: the library knows nothing of Python.
        return str(Path(*ext_name.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        try:
            self._compile_side_by_side()
            super().build_extension(ext)
        except (Exception, SystemExit) as error:
            warn(str(error))

    def _compile_side_by_side(self) -> None:
        compile_one_after_another = self.compiler.compile

        def compile_all(sources: list[str], **options: object) -> list[str]:
            def compile_one(source: str) -> list[str]:
                return compile_one_after_another([source], **options)

            jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
            with ThreadPoolExecutor(jobs) as pool:
                return [name for names in pool.map(compile_one, sources) for name in names]

        self.compiler.compile = compile_all


class PythonIndependentWheel(bdist_wheel):
    """Tags the wheel for a platform, but for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (
            ("py3", "none", platform) if self.distribution.ext_modules else (python, abi, platform)
        )


setup(
    packages=[
        package
        for name, folder in PACKAGE_FOLDERS.items()
        for package in packages_below(name, folder)
    ],
    package_dir=PACKAGE_FOLDERS,
    package_data={"dn_detr": ["py.typed"]},
    ext_modules=operators(),
    cmdclass={"bdist_wheel": PythonIndependentWheel, "build_ext": BuildOperators},
)
