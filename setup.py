"""Maps the folders of the repository to packages and builds the compiled operators.

`configs/`, `tools/` and `projects/NAME/` lie beside the library, where people look for them. They
are installed as `dn_detr.configs`, `dn_detr.tools` and `dn_detr.projects.NAME`, so that a wheel
holds the zoo, the console command and the projects. The configs are read as files, never imported
by name, and have no `__init__.py`; `tools/` has one, because an editable installation finds no
namespace package inside a package.

The operators are two shared libraries: `dn_detr/_C.so` for CPUs, and `dn_detr/_C_cuda.so`, which is
loaded when a CUDA tensor arrives, so that one wheel serves machines with and without CUDA. They use
LibTorch's stable ABI only and know nothing of Python: they serve torch 2.11 and later and every
Python. A library that cannot be built leaves the reason in `dn_detr/_C*.missing.txt`, the
installation goes on, and dn_detr.ops computes in plain PyTorch. docs/install.md lists the
environment variables.
"""

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE_FOLDERS = {"dn_detr": "dn_detr", "dn_detr.configs": "configs", "dn_detr.tools": "tools"} | {
    f"dn_detr.projects.{path.parent.name}": f"projects/{path.parent.name}"
    for path in ROOT.glob("projects/*/__init__.py")
}

CPU, CUDA = "dn_detr._C", "dn_detr._C_cuda"
CPU_SOURCES = [
    "csrc/ms_deform_attn/cpu.cpp",
    "csrc/ms_deform_attn/cpu_avx512.cpp",
    "csrc/ms_deform_attn/cpu_avx2.cpp",
    "csrc/ms_deform_attn/cpu_portable.cpp",
    "csrc/registration.cpp",
]
CUDA_SOURCES = ["csrc/ms_deform_attn/cuda.cpp"]
CUDA_KERNELS = ["csrc/ms_deform_attn/cuda.cu", "csrc/cuda_problem.cu"]
BUILD_INFO = "csrc/build_info.cpp"  # in both libraries

SUFFIXES = (".cpp", ".cu", ".h")

OLDEST_TORCH = (2, 11)  # whose stable ABI the libraries rely on
OLDEST_ARCHITECTURE = 80
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"

CXX_OPTIONS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-ffp-contract=fast",  # a * b + c rounds once where the processor can
    "-fvisibility=hidden",
    "-Wno-psabi",  # vectors are passed between functions of one file only
    "-Wno-ignored-attributes",
]
NVCC_OPTIONS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]


class CannotBuildError(Exception):
    """Why a library cannot be built, in words that complete "is not built: ..."."""


def output_of(*command: str) -> str:
    """What a command prints, on both channels; it must succeed."""
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise CannotBuildError(f"{command[0]} cannot be run: {error.strerror}") from error
    if result.returncode != 0:
        said = result.stdout + result.stderr
        raise CannotBuildError(f"{command[0]} failed\n{shlex.join(command)}\n{said}")
    return result.stdout + result.stderr


# ---- What is there ----


class Torch(NamedTuple):
    """The installed PyTorch."""

    folder: Path
    version: str


def find_torch() -> Torch:
    """Found without importing it, which takes seconds.

    The environment of this Python is searched as well: pip hides it while it isolates a build.
    """
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if (spec := importlib.util.find_spec("torch")) and spec.origin:
        folders.insert(0, str(Path(spec.origin).parents[1]))
    found = [path for folder in folders if (path := Path(folder, "torch", "version.py")).is_file()]
    if not found:
        raise CannotBuildError("torch was not there yet: install torch first, then dn_detr")
    folder = found[0].parent
    match = re.search(r"__version__ = '((\d+)\.(\d+).*?)'", found[0].read_text())
    if match is None or tuple(map(int, match.groups()[1:])) < OLDEST_TORCH:
        raise CannotBuildError(f"torch in {folder} is older than 2.11")
    if not (folder / "include/torch/csrc/stable/library.h").is_file():
        raise CannotBuildError(f"torch in {folder} came without its headers")
    return Torch(folder, match.group(1))


def find_cxx() -> list[str]:
    """The C++ compiler and the user's options for it: CXX, CPPFLAGS and CXXFLAGS."""
    if sys.platform == "win32":
        raise CannotBuildError("Windows is not supported")
    options = shlex.split(f"{os.environ.get('CPPFLAGS', '')} {os.environ.get('CXXFLAGS', '')}")
    if named := os.environ.get("CXX"):
        return [*shlex.split(named), *options]
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name, *options]
    raise CannotBuildError("no C++ compiler was found: g++ is not on the PATH, CXX is not set")


class Toolkit(NamedTuple):
    """A CUDA compiler, and the folders that it does not know itself."""

    nvcc: str
    version: str
    include_dirs: list[str]
    library_dirs: list[str]


def find_toolkit(site_packages: Path) -> Toolkit:
    """The CUDA compiler with headers and libraries, from a toolkit, pip's packages, or both."""
    packages = sorted((site_packages / "nvidia").glob("cu[0-9]*"), reverse=True)
    nvcc = find_nvcc(packages)
    plan = output_of(nvcc, "--dryrun", "-c", "-x", "cu", os.devnull)
    known_headers, known_libraries = (re.findall(rf'-{x}([^"\s]+)', plan) for x in "IL")
    include_dirs = [str(package / "include") for package in packages]
    if has_headers(known_headers):
        include_dirs = []
    elif not has_headers(include_dirs):
        raise CannotBuildError(f"{nvcc} is there, but cuda_runtime.h or cuda_bf16.h is not")
    version = re.search(r"V([\d.]+)", output_of(nvcc, "--version"))
    return Toolkit(
        nvcc,
        version.group(1) if version else "of unknown version",
        include_dirs,
        [*known_libraries, *(str(package / "lib") for package in packages)],
    )


def find_nvcc(packages: list[Path]) -> str:
    """From CUDA_HOME, else from the PATH, else from pip's packages."""
    if home := os.environ.get("CUDA_HOME"):
        if nvcc := shutil.which("nvcc", path=f"{home}/bin"):
            return nvcc
        raise CannotBuildError(f"CUDA_HOME is {home}, but {home}/bin has no nvcc")
    for path in (None, *(str(package / "bin") for package in packages)):  # None: the PATH
        if nvcc := shutil.which("nvcc", path=path):
            return nvcc
    raise CannotBuildError(
        "no CUDA compiler was found: nvcc is neither on the PATH nor installed by pip, and "
        "CUDA_HOME is not set"
    )


def has_headers(folders: list[str]) -> bool:
    """Whether the folders have the headers that csrc/ includes, which are in several packages."""
    names = ("cuda_runtime.h", "cuda_bf16.h", "crt/host_defines.h")
    return all(any(Path(folder, name).is_file() for folder in folders) for name in names)


def architectures(nvcc: str) -> list[str]:
    """What to compile for: real architectures ("sm_80") and virtual ones ("compute_100").

    Of the default list, what an older nvcc does not know is left out; the newest one that it does
    know then comes as PTX as well.
    """
    names = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES
    numbers = parse_architectures(names)
    if names == DEFAULT_ARCHITECTURES:
        known = output_of(nvcc, "--list-gpu-code").split()
        numbers = {number: False for number in numbers if f"sm_{number}" in known}
        numbers[list(numbers)[-1]] = True
    virtual = [f"compute_{number}" for number, with_ptx in numbers.items() if with_ptx]
    return [f"sm_{number}" for number in numbers] + virtual


def parse_architectures(names: str) -> dict[str, bool]:
    """From "8.0;9.0a 10.0+PTX" {"80": False, "90a": False, "100": True}: whether PTX is wanted."""
    numbers = {}
    for name in re.split(r"[;,\s]+", names.strip("; ,")):
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if parts is None:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST must look like {DEFAULT_ARCHITECTURES}, not {names!r}"
            )
        major, minor, suffix, ptx = parts.groups()
        if int(major + minor) >= OLDEST_ARCHITECTURE:
            numbers[major + minor + suffix] = ptx is not None
    if not numbers:
        raise CannotBuildError(f"TORCH_CUDA_ARCH_LIST={names!r} names nothing from 8.0 on")
    return numbers


# ---- What is done ----


class Unit(NamedTuple):
    """A source file and how it is compiled."""

    source: str
    command: list[str]

    def compile(self) -> str:
        """The object file; compiled unless nothing that it depends on has changed."""
        key = hashlib.sha256(repr(self).encode()).hexdigest()[:16]
        target = ROOT / "build" / "operators" / f"{Path(self.source).stem}-{key}.o"
        stamp = target.with_suffix(".json")
        if target.is_file() and stamp.is_file():
            before = json.loads(stamp.read_text())
            if digests(before) == before:
                return str(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        part = target.with_suffix(f".{os.getpid()}.o")  # of this process: others may build as well
        rule = part.with_suffix(".d")
        output_of(*self.command, "-c", self.source, "-o", str(part), "-MMD", "-MF", str(rule))
        dependencies = shlex.split(rule.read_text().replace("\\\n", " "))[1:]
        rule.unlink()
        part.replace(target)
        stamp.write_text(json.dumps(digests(dependencies)))
        return str(target)


def digests(paths: Iterable[str]) -> dict[str, str]:
    """What files hold; "" for one that is not there."""
    files = {path: ROOT / path for path in paths}
    return {
        path: hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
        for path, file in files.items()
    }


class Library(NamedTuple):
    """A library and all that it is made of, before anything is compiled."""

    name: str
    units: list[Unit]
    linker: list[str]
    libraries: list[str]


def cpu_library() -> Library:
    """The plan of `_C.so`."""
    torch, cxx = find_torch(), find_cxx()
    units = [torch_unit(source, torch, cxx) for source in CPU_SOURCES]
    return Library(CPU, [*units, build_info(torch, cxx)], linker(cxx), torch_libraries(torch))


def cuda_library() -> Library:
    """The plan of `_C_cuda.so`; CUDA's runtime is linked into it."""
    if cuda_wish() == "0":
        raise CannotBuildError("DN_DETR_CUDA was 0")
    torch = find_torch()
    toolkit = find_toolkit(torch.folder.parent)
    cxx = find_cxx()
    targets = architectures(toolkit.nvcc)
    nvcc = [toolkit.nvcc, *NVCC_OPTIONS, f"--threads={jobs()}"]
    nvcc += [f"-I{folder}" for folder in toolkit.include_dirs]
    nvcc += [f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in targets]
    units = [Unit(source, nvcc) for source in CUDA_KERNELS]
    units += [torch_unit(source, torch, cxx) for source in CUDA_SOURCES]
    units.append(build_info(torch, cxx, nvcc=toolkit.version, architectures=" ".join(targets)))
    libraries = torch_libraries(torch) + [f"-L{folder}" for folder in toolkit.library_dirs]
    libraries += ["-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
    return Library(CUDA, units, linker(cxx), libraries)


def torch_unit(source: str, torch: Torch, cxx: list[str]) -> Unit:
    """C++ that includes PyTorch's headers."""
    stable_abi = "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)
    return Unit(source, [*cxx, *CXX_OPTIONS, stable_abi, f"-I{torch.folder / 'include'}"])


def build_info(torch: Torch, cxx: list[str], **others: str) -> Unit:
    """What a library tells about itself, as JSON, and the number of its interface."""
    compiler = output_of(cxx[0], "--version").partition("\n")[0]
    entries = {"torch": torch.version, "compiler": compiler, **others, "sources": source_digest()}
    text = json.dumps(json.dumps(entries))  # twice: a string of C++
    macros = [f"-DDN_DETR_INTERFACE={interface()}", f"-DDN_DETR_BUILD_INFO={text}"]
    return Unit(BUILD_INFO, [*cxx, *CXX_OPTIONS, *macros])


def interface() -> int:
    """The number that dn_detr.ops expects of a library."""
    text = (ROOT / "dn_detr" / "ops" / "library.py").read_text(encoding="utf-8")
    return int(re.search(r"^INTERFACE = (\d+)", text, re.MULTILINE).group(1))


def source_digest() -> str:
    """Of csrc/; dn_detr.ops.library computes the same to tell a library of other sources."""
    files = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in SUFFIXES)
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def linker(cxx: list[str]) -> list[str]:
    """The command before the object files, with the user's LDFLAGS."""
    return [*cxx, "-shared", *shlex.split(os.environ.get("LDFLAGS", ""))]


def torch_libraries(torch: Torch) -> list[str]:
    """All of PyTorch that is linked: the stable ABI, which every build of it has."""
    return [f"-L{torch.folder / 'lib'}", "-ltorch_cpu"]


def cuda_wish() -> str:
    """The environment variable DN_DETR_CUDA."""
    wish = os.environ.get("DN_DETR_CUDA") or "auto"
    if wish not in ("0", "1", "auto"):
        raise SystemExit(f"DN_DETR_CUDA must be 0, 1 or auto, not {wish!r}")
    return wish


def jobs() -> int:
    """How many compilers run side by side: MAX_JOBS, or one for each core."""
    value = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not value.isdecimal() or int(value) == 0:
        raise SystemExit(f"MAX_JOBS must be a positive number, not {value!r}")
    return int(value)


class BuildOperators(build_ext):
    """Builds each library that can be built and leaves the reason for each that cannot."""

    def get_ext_filename(self, ext_name: str) -> str:
        # No Python version in the name: the library knows nothing of Python.
        return str(Path(*ext_name.split("."))) + ".so"

    def build_extensions(self) -> None:
        cuda_wish()  # refuses nonsense before anything is compiled
        problems: dict[str, str] = {}
        plans = []
        for plan, name in ((cuda_library, CUDA), (cpu_library, CPU)):  # the longest first
            try:
                plans.append(plan())
            except CannotBuildError as error:
                problems[name] = str(error)
        problems |= self.build(plans)
        for name in (CPU, CUDA):
            self.conclude(name, problems.get(name))
        if cuda_wish() == "1" and problems:
            raise SystemExit("DN_DETR_CUDA is 1, but not everything could be built, see above")

    def build(self, libraries: list[Library]) -> dict[str, str]:
        """Compiles all sources side by side and links; returns what went wrong, by library."""
        problems = {}
        with ThreadPoolExecutor(jobs()) as pool:
            running = [[pool.submit(unit.compile) for unit in plan.units] for plan in libraries]
            for library, objects in zip(libraries, running, strict=True):
                target = self.built(library.name)
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    names = [future.result() for future in objects]
                    output_of(*library.linker, *names, *library.libraries, "-o", str(target))
                except CannotBuildError as error:
                    problems[library.name] = str(error)
        return problems

    def built(self, name: str) -> Path:
        """Where a library lies before it is copied to its place."""
        return Path(self.build_lib).resolve() / self.get_ext_filename(name)

    def conclude(self, name: str, problem: str | None) -> None:
        """Leaves either the library or the reason, never both."""
        library = self.built(name)
        reason = library.with_suffix(".missing.txt")
        if problem is None:
            reason.unlink(missing_ok=True)
            return
        library.unlink(missing_ok=True)
        reason.parent.mkdir(parents=True, exist_ok=True)
        reason.write_text(problem + "\n", encoding="utf-8")
        print(f"warning: {library.name} is not built: {problem}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """For an editable installation, and for `setup.py build_ext --inplace`."""
        for name in (CPU, CUDA):
            library = self.built(name)
            for built in (library, library.with_suffix(".missing.txt")):
                target = ROOT / "dn_detr" / built.name
                target.unlink(missing_ok=True)  # a new file: processes may have mapped the old one
                if built.is_file():
                    shutil.copy(built, target)


class PythonIndependentWheel(bdist_wheel):
    """Tags the wheel for a platform, but for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def packages_below(name: str, folder: str) -> list[str]:
    """Every folder that holds Python files, with or without an `__init__.py`, as a package."""
    root = ROOT / folder
    parents = {path.parent.relative_to(root).parts for path in root.rglob("*.py")}
    return sorted(".".join((name, *parts)) for parts in parents)


if __name__ == "__main__":
    setup(
        packages=[
            package
            for name, folder in PACKAGE_FOLDERS.items()
            for package in packages_below(name, folder)
        ],
        package_dir=PACKAGE_FOLDERS,
        package_data={"dn_detr": ["py.typed"]},
        ext_modules=[  # for BuildOperators, which knows what they are made of
            Extension(CPU, CPU_SOURCES, optional=True),
            Extension(CUDA, CUDA_KERNELS + CUDA_SOURCES, optional=True),
        ],
        cmdclass={"bdist_wheel": PythonIndependentWheel, "build_ext": BuildOperators},
    )
