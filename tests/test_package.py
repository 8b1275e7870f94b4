"""What `pip install` makes of the repository, seen from outside the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import dn_detr

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
FOLDERS = ("dn_detr", "configs", "projects", "tools")
Run = Callable[..., str]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Output of a command that must succeed; PYTHONPATH is empty unless given."""
    result = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module", params=["wheel", "editable"])
def run_installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a command of a fresh environment that has dn_detr from a copy of the sources.

    The environment borrows all other packages from the running one. While dn_detr is built,
    torch cannot be imported.
    """
    folder = tmp_path_factory.mktemp(request.param)
    checkout, environment = folder / "checkout", folder / "environment"
    checkout.mkdir()
    for name in (*SOURCES, *FOLDERS):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, checkout / name)
    project = checkout / "projects" / "small_project"
    (project / "configs").mkdir(parents=True)
    (project / "__init__.py").touch()
    (project / "modeling.py").write_text("class Net:\n    width = 3\n")
    config = (
        "from dn_detr.config import LazyCall as L\nfrom ..modeling import Net\nmodel = L(Net)()"
    )
    (project / "configs" / "small_net.py").write_text(config)
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=folder)
    python = environment / "bin" / "python"
    site_packages = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)[:-1]
    )
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    (folder / "no_torch").mkdir()
    (folder / "no_torch" / "torch.py").write_text("raise ImportError('not at build time')")
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    source = ["--editable", checkout] if request.param == "editable" else [checkout]
    run(
        *(sys.executable, "-m", "pip", "--python", python, *install, *source),
        cwd=folder,
        PYTHONPATH=str(folder / "no_torch"),
    )
    return lambda command, *rest: run(environment / "bin" / command, *rest, cwd=folder)


def test_zoo_and_projects_load_outside_the_checkout(run_installed: Run) -> None:
    program = (
        "import dn_detr; print(dn_detr.__file__)\n"
        "from dn_detr.config import get_config, instantiate\n"
        "for name in ('dn_deformable_detr_r50_50ep', 'dino_r50_4scale_12ep'):\n"
        "    print(dn_detr.model_zoo.get_model(name).num_classes)\n"
        "model = get_config('small_net').model\n"
        "print(model._target_, instantiate(model).width, sep='\\n')"
    )
    place, *found = run_installed("python", "-c", program).splitlines()
    assert not place.startswith(str(ROOT))
    assert found == ["80", "80", "dn_detr.projects.small_project.modeling.Net", "3"]


def test_console_command_is_the_train_tool(run_installed: Run) -> None:
    usage = run_installed("dn-detr-train", "--help")
    for option in ("--config-file", "--eval-only", "--resume", "--num-gpus", "--print-config"):
        assert option in usage


def test_installed_package_holds_every_file_of_the_sources(run_installed: Run) -> None:
    program = (
        "import dn_detr, dn_detr.tools\n"
        "from dn_detr.config.zoo import zoo_root\n"
        "print(*dn_detr.__path__, zoo_root(), *dn_detr.tools.__path__, sep='\\n')"
    )
    places = map(Path, run_installed("python", "-c", program).splitlines())
    for source, place in zip(("dn_detr", "configs", "tools"), places, strict=True):
        expected = {path.relative_to(ROOT / source) for path in (ROOT / source).rglob("*.py")}
        assert expected
        assert expected <= {path.relative_to(place) for path in place.rglob("*.py")}


def test_metadata_has_the_version_of_the_library(run_installed: Run) -> None:
    program = "from importlib.metadata import version; print(version('dn_detr'))"
    assert run_installed("python", "-c", program).strip() == dn_detr.__version__


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {pin.name: pin for pin in pins}


def requirements() -> list[Requirement]:
    """What pyproject.toml asks for, extras included; tomllib is not in Python 3.10."""
    text = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:dependencies|demo|dev) = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
    assert len(lists) == 3
    return [Requirement(entry) for part in lists for entry in re.findall(r'"(.+?)"', part)]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_every_dependency_is_pinned_to_a_version_that_it_allows(requirement: Requirement) -> None:
    (pin,) = constraints()[requirement.name].specifier
    assert pin.operator == "=="
    assert Version(pin.version) in requirement.specifier
