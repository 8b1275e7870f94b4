"""Links, commands and config keys of the README and of the documentation exist.

Commands are the indented lines that begin with a program (`\\` joins lines). Those of `tools/` are
parsed as the program itself does, and their overrides are applied to the config that they name.
"""

from __future__ import annotations

import importlib
import io
import re
import shlex
from contextlib import redirect_stdout
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from dn_detr.config import LazyConfig, get_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    page.relative_to(ROOT).as_posix()
    for page in sorted(ROOT.glob("**/*.md"))
    if not {"output", "build", "node_modules"} & set(page.parts)
    and not any(part.startswith(".") for part in page.relative_to(ROOT).parts)
]
DEFAULT_CONFIG = "dn_deformable_detr_r50_50ep"
PROGRAMS = {"python", ".venv/bin/python", "torchrun", "make", "dn-detr-train"}
# A key of a config in the text, such as `train.accumulate` or `model.denoising=null`.
KEY = re.compile(r"`~?((?:train|dataloader|model|optimizer|lr_schedule)(?:\.\w+)+)(?:=[^`]*)?`")


@cache
def _text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def _prose(page: str) -> str:
    return re.sub(r"```.*?```", "", _text(page), flags=re.DOTALL)


def _commands(page: str) -> list[list[str]]:
    indented = [line[4:] for line in _prose(page).splitlines() if line.startswith("    ")]
    fenced = re.findall(r"```(?:sh|bash|console)\n(.*?)```", _text(page), re.DOTALL)
    lines = "\n".join([*indented, *fenced]).replace("\\\n", " ").splitlines()
    commands = []
    for line in lines:
        if line.strip().split(" ")[0] in PROGRAMS:
            commands.append(shlex.split(line, comments=True))
    return commands


COMMANDS = [(page, shlex.join(words)) for page in PAGES for words in _commands(page)]


@cache
def _config(name: str) -> DictConfig:
    """The config that a command names; the default one for a reader's own."""
    if name == "..." or name.startswith(("my", "/", "output/")):
        return get_config(DEFAULT_CONFIG)
    return LazyConfig.load(ROOT / name) if "/" in name else get_config(name)


@cache
def _options(script: str) -> frozenset[str]:
    """The options of a command, from its help; of other scripts, all that look like one."""
    words = (ROOT / script).read_text(encoding="utf-8")
    if script.startswith("tools/"):
        help_text = io.StringIO()
        with redirect_stdout(help_text), pytest.raises(SystemExit):
            importlib.import_module(f"tools.{Path(script).stem}").main(["--help"])
        words = help_text.getvalue().partition("\n\n")[0]
    return frozenset(re.findall(r"--[a-z][\w-]*", words))


def _check_make(words: list[str]) -> None:
    makefile = _text("Makefile")
    for word in words:
        name, _, value = word.partition("=")
        pattern = rf"^{name} *[:?]?=" if value or "=" in word else rf"^{name}:"
        assert re.search(pattern, makefile, re.MULTILINE), word


def _check_script(script: str, words: list[str]) -> None:
    assert (ROOT / script).is_file(), script
    given = {word.split("=")[0] for word in words if word.startswith("--")}
    assert given <= _options(script), f"{script} has no {sorted(given - _options(script))}"
    named = dict(pairwise(words))
    overrides = [word for word in words if "=" in word and not word.startswith("--")]
    if "--config-file" in _options(script):
        assert LazyConfig.apply_overrides(
            _config(named.get("--config-file", DEFAULT_CONFIG)), overrides
        )


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_command_names_what_exists(page, command):
    words = shlex.split(command)
    program = words.pop(0)
    if program == "make":
        _check_make(words)
        return
    if program == "dn-detr-train":
        words.insert(0, "tools/train_net.py")
    if program == "torchrun":
        words = words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]
    if words[0] == "-m":
        module = words[1]
        assert module == "pytest" or importlib.util.find_spec(module), module
        files = [word for word in words[2:] if word.startswith(("tests/", "benchmarks/"))]
        assert all((ROOT / file).exists() for file in files), files
    else:
        _check_script(words[0], words[1:])


@pytest.mark.parametrize("page", PAGES)
def test_config_keys_in_the_text_exist(page):
    unknown = []
    configs = [DEFAULT_CONFIG, "dn_detr_r50_50ep", "digits_dn_deformable_detr"]
    configs += [path.name for path in sorted((ROOT / page).parent.glob("configs/*.py"))]
    for key in sorted(set(KEY.findall(_prose(page)))):
        if key.endswith(".safetensors") or key.startswith("train.callbacks."):
            continue  # a file, and what a project names as it likes
        values = (OmegaConf.select(_config(config), key, default="missing") for config in configs)
        if all(value == "missing" for value in values):
            unknown.append(key)
    assert not unknown, f"{page} names keys that no config has: {unknown}"


def _anchors(page: str) -> set[str]:
    headings = re.findall(r"^#+ +(.*)$", _text(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in _anchors(target.resolve().relative_to(ROOT).as_posix()), link


def test_pages_have_many_commands():
    assert len(COMMANDS) > 30
    assert {page for page, _ in COMMANDS} >= {"README.md", "docs/training.md", "docs/finetune.md"}
