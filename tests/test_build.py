"""What setup.py does with the compilers that it finds, and what is left where it finds none."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dn_detr import collect_env
from dn_detr.ops import library

ROOT = Path(__file__).parents[1]
FOLDERS = ("dn_detr", "configs", "tools", "csrc")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
TINY = "int main() { return VALUE; }"
NEEDS_GXX = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
NEEDS_LIBRARY = pytest.mark.skipif(
    library.missing_kernels("cpu") is not None, reason="needs the compiled operators"
)
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
OFFLINE = ("--no-deps", "--no-build-isolation", "--no-index")


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, without the user's choices."""
    for name in ("DN_DETR_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CXX", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("setup_of_dn_detr", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources in which nothing has been built."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    ignored = shutil.ignore_patterns("*.so", "*.missing.txt", "__pycache__")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    return copy


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command, without the user's choices."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("CXX", "CUDA_HOME")}
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**inherited, "PYTHONPATH": "", "DN_DETR_CUDA": "0", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def build_in(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=checkout, **environment)


def program(path: Path, *lines: str) -> Path:
    """A shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(("#!/bin/sh", *lines)) + "\n")
    path.chmod(0o755)
    return path


# ---- environment variables ----


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        ("8.0;9.0;10.0+PTX", {"80": False, "90": False, "100": True}),
        (" 8.6, 9.0a ", {"86": False, "90a": False}),
        ("12.0+PTX", {"120": True}),
        ("7.0 7.5+PTX 8.0", {"80": False}),  # containers name all that they know
    ],
)
def test_architectures_are_read_as_torch_writes_them(build, names, numbers):
    assert build.parse_architectures(names) == numbers


@pytest.mark.parametrize("names", ["sm_80", "8", "8.0;;Hopper", "+PTX", "8.0+ptx"])
def test_other_architectures_are_an_error_that_names_the_variable(build, names):
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST must look like"):
        build.parse_architectures(names)


def test_no_architecture_that_the_kernels_support_is_a_reason(build):
    with pytest.raises(build.CannotBuildError, match="names nothing from"):
        build.parse_architectures("7.0;7.5")


def test_an_old_nvcc_compiles_for_what_it_knows_and_carries_ptx(build, tmp_path):
    nvcc = program(tmp_path / "nvcc", "echo sm_80; echo sm_86; echo sm_90")
    assert build.architectures(str(nvcc)) == ["sm_80", "sm_90", "compute_90"]


def test_named_architectures_are_not_filtered(build, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6+PTX;12.1")
    assert build.architectures("no nvcc is asked") == ["sm_86", "sm_121", "compute_86"]


@pytest.mark.parametrize("name", ["DN_DETR_CUDA", "MAX_JOBS"])
@pytest.mark.parametrize("value", ["yes", "-1"])
def test_nonsense_is_an_error_that_names_the_variable(build, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"{name} must be .*'{value}'"):
        build.cuda_wish() if name == "DN_DETR_CUDA" else build.jobs()


# ---- torch and compilers ----


def test_nvcc_comes_from_cuda_home_then_the_path_then_pip(build, tmp_path, monkeypatch):
    home, path, package = (tmp_path / name for name in ("home", "path", "package"))
    monkeypatch.setenv("PATH", f"{path}/bin")
    with pytest.raises(build.CannotBuildError, match="no CUDA compiler was found"):
        build.find_nvcc([package])
    for folder in (package, path):
        nvcc = program(folder / "bin" / "nvcc")
        assert build.find_nvcc([package]) == str(nvcc)
    monkeypatch.setenv("CUDA_HOME", str(home))
    with pytest.raises(build.CannotBuildError, match=r"CUDA_HOME is .*home, but .* has no nvcc"):
        build.find_nvcc([package])
    nvcc = program(home / "bin" / "nvcc")
    assert build.find_nvcc([package]) == str(nvcc)


def test_headers_that_a_toolkit_lacks_come_from_pip(build, tmp_path, monkeypatch):
    toolkit, package = tmp_path / "toolkit", tmp_path / "nvidia" / "cu13"
    program(
        toolkit / "bin" / "nvcc",
        f"""echo '#$ INCLUDES="-I{toolkit}/include"' >&2""",
        f"""echo '#$ LIBRARIES= "-L{toolkit}/lib"' >&2""",
        "echo release 13.0, V13.0.88",
    )
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    with pytest.raises(build.CannotBuildError, match=r"nvcc is there, but cuda_runtime.h"):
        build.find_toolkit(tmp_path)
    headers = ("cuda_runtime.h", "cuda_bf16.h", "crt/host_defines.h")
    for folder, expected in ((package, [f"{package}/include"]), (toolkit, [])):
        for name in headers:
            program(folder / "include" / name)
        found = build.find_toolkit(tmp_path)
        assert found.include_dirs == expected
        assert found.library_dirs == [f"{toolkit}/lib", f"{package}/lib"]
        assert found.version == "13.0.88"


@pytest.mark.parametrize(
    ("version", "reason"),
    [("2.10.1+cu128", "older than 2.11"), ("2.11.0", "without its headers"), (None, "not there")],
)
def test_torch_that_cannot_be_used_is_a_reason(build, tmp_path, monkeypatch, version, reason):
    if version is not None:
        program(tmp_path / "torch" / "version.py", f"__version__ = '{version}'")
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(build.CannotBuildError, match=reason):
        build.find_torch()


def test_torch_is_found_while_pip_isolates_the_build(build, tmp_path, monkeypatch):
    program(tmp_path / "torch" / "version.py", "__version__ = '2.14.1+cu130'")
    program(tmp_path / "torch" / "include/torch/csrc/stable/library.h")
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    assert build.find_torch() == (tmp_path / "torch", "2.14.1+cu130")


@NEEDS_GXX
def test_only_what_changed_is_compiled_again(build, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "ROOT", tmp_path)
    (tmp_path / "value.h").write_text("#define VALUE 1\n")
    (tmp_path / "tiny.cpp").write_text(f'#include "value.h"\n{TINY}\n')
    unit = build.Unit("tiny.cpp", ["g++"])

    def compiled() -> bool:
        before = set(tmp_path.rglob("*.o"))
        for path in before:
            os.utime(path, (1, 1))
        return Path(unit.compile()).stat().st_mtime > 1

    assert compiled()
    assert not compiled()
    (tmp_path / "value.h").write_text("#define VALUE 2\n")
    assert compiled()
    assert not compiled()
    unit = build.Unit("tiny.cpp", ["g++", "-O1"])
    assert compiled()


# ---- what is left where nothing was built ----


def test_without_a_compiler_the_build_goes_on_and_leaves_the_reason(checkout):
    result = build_in(checkout, PATH="")
    assert result.returncode == 0, result.stdout
    assert "warning: _C.so is not built: no C++ compiler was found" in result.stdout
    reason = checkout / "dn_detr" / "_C.missing.txt"
    assert reason.read_text().startswith("no C++ compiler was found: g++ is not on the PATH")
    assert not list((checkout / "dn_detr").glob("*.so"))


def test_an_error_of_the_compiler_is_shown_and_an_old_library_removed(checkout, tmp_path):
    compiler = program(
        tmp_path / "broken", 'test "$1" = --version && exec echo 1', "echo 42: no!; exit 1"
    )
    old = checkout / "dn_detr" / "_C.so"
    old.touch()
    result = build_in(checkout, CXX=str(compiler))
    assert result.returncode == 0, result.stdout
    assert f"warning: _C.so is not built: {compiler} failed\n{compiler} " in result.stdout
    assert "\n42: no!" in result.stdout
    assert not old.exists()


def test_cuda_that_is_asked_for_must_be_built(checkout, tmp_path):
    result = build_in(checkout, PATH="", DN_DETR_CUDA="1", CUDA_HOME=str(tmp_path))
    assert result.returncode != 0
    assert f"_C_cuda.so is not built: CUDA_HOME is {tmp_path}, but" in result.stdout
    assert "DN_DETR_CUDA is 1, but not everything could be built" in result.stdout


def test_another_wish_is_refused_before_anything_is_compiled(checkout):
    result = build_in(checkout, DN_DETR_CUDA="yes", CXX="false")
    assert result.returncode != 0
    assert "DN_DETR_CUDA must be 0, 1 or auto, not 'yes'" in result.stdout
    assert "is not built" not in result.stdout


def test_without_torch_the_build_goes_on(checkout, tmp_path):
    """As in the environment that pip makes for a build, but with no torch outside either."""
    hide = (
        "import runpy, sysconfig, sys; sysconfig.get_path = lambda name: ''; "
        "import importlib.util as u; u.find_spec = lambda name: None; "
        "sys.argv = ['setup.py', 'build_ext', '--inplace']; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    result = run(sys.executable, "-c", hide, cwd=checkout)
    assert result.returncode == 0, result.stdout
    assert "_C.so is not built: torch was not there yet: install torch first" in result.stdout


# ---- libraries that cannot be used ----


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the libraries are looked for."""
    monkeypatch.setattr(library, "CPU_LIBRARY", tmp_path / "_C.so")
    monkeypatch.setattr(library, "CUDA_LIBRARY", tmp_path / "_C_cuda.so")
    library.missing_kernels.cache_clear()
    yield tmp_path
    library.missing_kernels.cache_clear()


def compile_library(target: Path, source: str) -> None:
    source_file = target.with_suffix(".cpp")
    source_file.write_text(source)
    command = ["g++", "-shared", "-fPIC", "-o", str(target), str(source_file)]
    subprocess.run(command, check=True)


def test_a_library_that_was_not_built_is_named(folder):
    assert library.missing_kernels("cpu") == "the installation built no _C.so"
    assert library.missing_kernels("cuda") == "the installation built no _C.so"
    assert library.missing_kernels("xpu") == "dn_detr has no kernels for xpu"


def test_the_reason_that_the_installation_left_is_given(folder):
    (folder / "_C.missing.txt").write_text("no compiler\n")
    assert library.missing_kernels("cpu") == "the installation built no _C.so: no compiler"


def test_of_a_long_reason_the_first_line_is_given(folder):
    reason = folder / "_C.missing.txt"
    reason.write_text("g++ failed\ng++ x.cpp\nx.cpp: error\n")
    expected = f"the installation built no _C.so: g++ failed (all of it: {reason})"
    assert library.missing_kernels("cpu") == expected


def test_a_broken_library_is_named(folder):
    (folder / "_C.so").write_text("no library")
    assert f"{folder / '_C.so'} cannot be loaded (" in library.missing_kernels("cpu")


@NEEDS_LIBRARY
@pytest.mark.parametrize("share", [0.0001, 0.1, 0.5, 0.99])
def test_a_library_that_was_cut_off_is_refused_before_it_kills_the_process(folder, share):
    whole = (Path(library.__file__).parents[1] / "_C.so").read_bytes()
    (folder / "_C.so").write_bytes(whole[: max(int(share * len(whole)), 40)])
    expected = f"{folder / '_C.so'} is cut off; install dn_detr again"
    assert library.missing_kernels("cpu") == expected


@NEEDS_GXX
@pytest.mark.parametrize(
    ("source", "number"),
    [("", 0), ('extern "C" int dn_detr_interface() { return 99; }', 99)],
    ids=["none", "other"],
)
def test_a_library_of_another_version_is_refused(folder, source, number):
    compile_library(folder / "_C.so", source)
    expected = f"has interface {number}, but this dn_detr needs {library.INTERFACE}; install"
    assert expected in library.missing_kernels("cpu")
    assert library.build_info() == {}


@NEEDS_GXX
def test_missing_cuda_kernels_leave_those_of_the_cpu(folder):
    source = f'extern "C" int dn_detr_interface() {{ return {library.INTERFACE}; }}'
    compile_library(folder / "_C.so", source)
    (folder / "_C_cuda.missing.txt").write_text("DN_DETR_CUDA was 0\n")
    assert library.missing_kernels("cpu") is None
    expected = "the installation built no _C_cuda.so: DN_DETR_CUDA was 0"
    assert library.missing_kernels("cuda") == expected


@NEEDS_GXX
def test_words_of_cuda_are_passed_on(folder, monkeypatch):
    number = f'extern "C" int dn_detr_interface() {{ return {library.INTERFACE}; }}\n'
    words = 'extern "C" const char* dn_detr_cuda_problem() { return "too old"; }'
    compile_library(folder / "_C.so", number)
    compile_library(folder / "_C_cuda.so", number + words)
    assert library.missing_kernels("cuda") == "PyTorch finds no CUDA device"
    monkeypatch.setattr(library.torch.cuda, "is_available", lambda: True)
    library.missing_kernels.cache_clear()
    expected = f"the kernels of {folder / '_C_cuda.so'} cannot run (too old)"
    assert library.missing_kernels("cuda") == expected


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (RuntimeError("offsets has the shape ()"), ValueError),  # torch 2.15
        (ValueError("offsets has the shape ()"), ValueError),  # older
        (RuntimeError("ms_deform_attn: no kernel image is available"), RuntimeError),
        (torch.OutOfMemoryError("value does not fit"), torch.OutOfMemoryError),
    ],
)
def test_complaints_about_arguments_are_value_errors(raised, expected):
    def operator(*arguments: object) -> None:
        raise raised

    with pytest.raises(expected, match=re.escape(str(raised))) as caught:
        library.call(operator, 1, 2)
    assert caught.type is expected


# ---- python -m dn_detr.collect_env ----


def test_report_without_libraries_says_why(folder, monkeypatch):
    for name in ("CPU_LIBRARY", "CUDA_LIBRARY"):
        monkeypatch.setattr(collect_env, name, getattr(library, name))
    (folder / "_C.missing.txt").write_text("no compiler\n")
    text = collect_env.describe_environment()
    for device in ("cpu", "cuda"):
        reason = "the installation built no _C.so: no compiler"
        assert f"\nkernels for {device}: PyTorch (slow): {reason}\n" in text
    for name in ("_C.so", "_C_cuda.so"):
        assert f"\n{folder / name}: not usable\n" in text


def test_report_has_versions_devices_and_variables(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DN_DETR_CUDA", "0")
    monkeypatch.delenv("DN_DETR_CPU_KERNELS", raising=False)
    lines = collect_env.describe_environment().splitlines()
    for name in ("torch", "torchvision", "numpy"):
        assert f"{name}: {version(name)}" in lines
    for line in ("OMP_NUM_THREADS: 1", "DN_DETR_CUDA: 0", "DN_DETR_CPU_KERNELS: not set"):
        assert line in lines
    names = {line.partition(":")[0] for line in lines}
    assert {"Python", "CPU", "CUDA of torch", "kernels for cpu", "kernels for cuda"} <= names


@NEEDS_LIBRARY
def test_module_prints_the_instruction_set_and_what_built_the_library():
    command = (sys.executable, "-m", "dn_detr.collect_env")
    result = run(*command, cwd=ROOT, DN_DETR_CPU_KERNELS="portable")
    assert result.returncode == 0, result.stdout
    assert "\nkernels for cpu: compiled, portable\n" in result.stdout
    torch_version = library.build_info()["_C.so"]["torch"]
    assert f"\n{library.CPU_LIBRARY}: built with torch {torch_version}, " in result.stdout


@NEEDS_LIBRARY
@pytest.mark.parametrize(
    ("variable", "value", "line"),
    [
        ("DN_DETR_KERNELS", "pytorch", "PyTorch (slow): DN_DETR_KERNELS is 'pytorch'"),
        ("DN_DETR_KERNELS", "fast", "none: DN_DETR_KERNELS is 'fast', not one of auto, pytorch"),
        ("DN_DETR_CPU_KERNELS", "sse9", "(not 'sse9', which DN_DETR_CPU_KERNELS names)"),
    ],
)
def test_report_tells_the_effect_of_a_variable(monkeypatch, variable, value, line):
    monkeypatch.setenv(variable, value)
    (kernels,) = re.findall(
        "^kernels for cpu: .*", collect_env.describe_environment(), re.MULTILINE
    )
    assert kernels.endswith(line)


def test_report_tells_that_the_sources_have_changed(build):
    info = {"torch": "2.14.1", "compiler": "g++ 12", "sources": build.source_digest()}
    assert collect_env._origin(info) == "built with torch 2.14.1, g++ 12"
    assert "has changed since" in collect_env._origin(info | {"sources": "others"})


# ---- installing ----

MODEL_RUNS = """
import torch
from dn_detr import model_zoo
model = model_zoo.get_model("digits_dn_deformable_detr")
output, = model([{"image": torch.zeros(3, 64, 64, dtype=torch.uint8), "height": 64, "width": 64}])
print("found", len(output["instances"].scores))
"""


@pytest.mark.slow
def test_pip_installs_without_a_compiler_and_models_run(checkout, tmp_path):
    target = tmp_path / "target"
    install = run(*PIP, "install", *OFFLINE, "--target", target, ".", cwd=checkout, PATH="")
    assert install.returncode == 0, install.stdout
    result = run(sys.executable, "-c", MODEL_RUNS, cwd=tmp_path, PYTHONPATH=str(target))
    assert result.returncode == 0, result.stdout
    assert "found " in result.stdout
    assert result.stdout.count("uses slow PyTorch kernels") == 1
    assert "the installation built no _C.so: no C++ compiler was found" in result.stdout


@pytest.mark.slow
@NEEDS_GXX
def test_a_wheel_has_the_library_and_serves_every_python(checkout, tmp_path):
    wheels = tmp_path / "wheels"
    compiled = ROOT / "build" / "operators"
    if compiled.is_dir():  # what is up to date there need not be compiled again
        shutil.copytree(compiled, checkout / "build" / "operators")
    result = run(*PIP, "wheel", *OFFLINE, "--wheel-dir", wheels, ".", cwd=checkout)
    assert result.returncode == 0, result.stdout
    (wheel,) = wheels.iterdir()
    assert "-py3-none-" in wheel.name and "-any" not in wheel.name
    target = tmp_path / "target"
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        file.extractall(target)
    assert "dn_detr/_C.so" in names
    assert "dn_detr/_C_cuda.missing.txt" in names
    assert not [name for name in names if name.startswith("csrc/")]
    result = run(sys.executable, "-c", MODEL_RUNS, cwd=tmp_path, PYTHONPATH=str(target))
    assert result.returncode == 0, result.stdout
    assert "slow PyTorch kernels" not in result.stdout


@pytest.mark.slow
def test_a_source_distribution_holds_what_the_build_needs(checkout):
    result = run(sys.executable, "setup.py", "--quiet", "sdist", cwd=checkout)
    assert result.returncode == 0, result.stdout
    (archive,) = (checkout / "dist").iterdir()
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert sources and sources <= names
    assert {"setup.py", "pyproject.toml", "configs/digits_dn_deformable_detr.py"} <= names
