"""YAML configs drawn from seeds: hostile names and texts, calls with any arguments, damage.

    python -m tests.fuzz.configs --seconds 600

What is read is resolved and built, too.
"""

from __future__ import annotations

import functools
import inspect
import json
import random
import sys
import types
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm  # noqa: F401 - which makes folders where it is imported
import torchvision.transforms.v2  # noqa: F401 - whose names are drawn, too
from omegaconf import OmegaConf

from dn_detr.config import ConfigError, LazyConfig, get_config, instantiate
from dn_detr.config.nodes import plain, walk
from dn_detr.config.targets import locate
from dn_detr.config.yaml_check import CLASSES, FUNCTIONS
from dn_detr.engine import TrainSettings
from dn_detr.errors import UserError
from tests.fuzz.driver import main

NAMES = (
    "canary_module.called", "os.system", "builtins.eval", "builtins.exec", "subprocess.run",
    "torch.load", "importlib.import_module", "torch.hub.load", "dn_detr.engine.train",
    "hydra.utils.instantiate", "torch.nn.Module.load_state_dict", "dn_detr.config.LazyConfig.save",
    "torch.nn.Linear.__init__",
)  # fmt: skip
TEXTS = (
    "${canary_module:1}", "${oc.env:HOME}", "${oc.decode:'${a}'}", "\\${oc.env:HOME}", "${a}",
    "${.a}", "${..b}", "${a}${a}", "${a.${b}}", "${${b}}", "${a[0]}", "???", "${",
    "\\\\${oc.env:HOME}", "~", "${oc.create:{_target_:canary_module.called}}", "1e400",
    "0x" + "f" * 500, "9" * 5000, "1:1:1:1", "\x1b[31m", "\u2028",
)  # fmt: skip
LINES = (
    "a: &a [*a]", "<<: *a", "<<: {a: 1}", "a: !!python/object/apply:canary_module.called []",
    "--- ", "a: !!python/name:canary_module.called ''", "1: a\ntrue: b",
    "%TAG ! tag:yaml.org,2002:python/", "a: &x {b: *x}", "!!set {a}", "a: !!timestamp 2020-01-01",
    "a: |\n  b", "a: " + "[" * 100, "? [a]\n: b", "\x00", "\ufeff", "\t",
)  # fmt: skip
KEYS = (
    "_target_",
    "_partial_",
    "_args_",
    "_convert_",
    "_recursive_",
    "a",
    "b",
    "c",
    "model",
    "train",
)
ROOTS = ("dn_detr.", "torch", "torchvision.", "os", "builtins", "omegaconf", "yaml", "numpy")

# As they are before the first case: a seed must draw the same config when it is repeated.
MODULES = sorted(name for name in sys.modules if name.startswith(ROOTS))


def write(rng: random.Random, folder: Path) -> Path:
    """Write the config of a seed."""
    path = folder / "config.yaml"
    kind = rng.randrange(4)
    if kind == 0:
        text = json.dumps(_tree(rng, 4))
    elif kind == 1:
        text = json.dumps({key: _call(rng, 3) for key in KEYS[-5:]})
    else:
        cfg = get_zoo()
        sections = rng.sample(list(cfg), rng.randint(1, len(cfg)))
        data = {key: json.loads(json.dumps(plain(cfg)[key])) for key in sections}
        text = LazyConfig.to_yaml(OmegaConf.create(data))
        if kind == 2:
            _replace(rng, data)
            text = json.dumps(data)
        else:
            text = _damage(rng, text)
    path.write_bytes(text.encode(errors="surrogatepass"))
    return path


def read(path: Path) -> None:
    """Load, resolve and build."""
    rng = random.Random(path.stat().st_size)
    overrides = [f"{rng.choice(KEYS)}={rng.choice(('1', 'a', '${a}', '{a: 1}', '[1]'))}"]
    cfg = LazyConfig.load(path, overrides=overrides if rng.random() < 0.2 else [])
    for key, name in walk(plain(cfg)):
        if key.rpartition(".")[2] == "_target_":
            found = locate(name)
            assert isinstance(found, type) or name in FUNCTIONS or found in _functions(), name
    LazyConfig.to_yaml(cfg, resolve=True)
    with suppress(UserError):
        TrainSettings.from_config(cfg)
    numbers = [value for _, value in walk(plain(cfg)) if isinstance(value, int)]
    if max(numbers, default=0) <= 10_000:  # else it may rightly take hours to build
        with suppress(ConfigError):
            instantiate(cfg)


@functools.cache
def _functions() -> list[Any]:
    return [locate(name) for name in FUNCTIONS]


@functools.cache
def get_zoo() -> Any:
    return get_config("digits_dn_deformable_detr")


@functools.cache
def _classes() -> list[type]:
    """What may be named."""
    found = {
        value
        for name, module in list(sys.modules.items())
        if name.startswith(("dn_detr", "torch.nn", "torch.optim", "torchvision"))
        for value in vars(module).values()
        if isinstance(value, type) and f"{value.__module__}.".startswith(CLASSES)
    }
    return sorted(found, key=lambda value: (value.__module__, value.__qualname__))


def _call(rng: random.Random, depth: int) -> dict[str, Any]:
    """A call of a class or function that may be named, with some of its arguments."""
    target: Any = rng.choice((*_classes(), *_functions()))
    with suppress(TypeError, ValueError):  # it has no signature
        names = [name for name in inspect.signature(target).parameters if name != "self"]
        arguments = {name: _tree(rng, depth) for name in names if rng.random() < 0.8}
        return {"_target_": f"{target.__module__}.{target.__qualname__}", **arguments}
    return {}


def _tree(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(4 if depth else 2)
    if kind == 3 and rng.random() < 0.7:
        return _call(rng, depth - 1)
    if kind == 3 or depth == 4:
        keys = rng.choices(KEYS, k=rng.randint(0, 5))
        return {k: _name(rng) if k == "_target_" else _tree(rng, depth - 1) for k in keys}
    if kind == 2:
        return [_tree(rng, depth - 1) for _ in range(rng.randint(0, 4))]
    if kind == 1 and rng.random() < 0.1:
        return rng.choice(TEXTS)
    return rng.choice(
        (0, 1, -1, 2, 7, True, None, 0.5, float("inf"), "canary", "a", 10**12, [], {})
    )


def _replace(rng: random.Random, data: Any) -> None:
    """Change a value somewhere below; a new target half of the times."""
    places = [
        data,
        *(value for _, value in walk(data) if isinstance(value, (dict, list)) and value),
    ]
    calls = [place for place in places if isinstance(place, dict) and "_target_" in place]
    if calls and rng.random() < 0.5:
        place = rng.choice(calls)
        place["_target_"] = _name(rng)
        if rng.random() < 0.5:
            place["_partial_"] = True
        return
    place = rng.choice(places)
    key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
    place[key] = _tree(rng, 3)


def _name(rng: random.Random) -> Any:
    """A dotted name: mostly of what can be reached from a loaded module, step by step."""
    if rng.random() < 0.2:
        return rng.choice(
            (*NAMES, *TEXTS, 5, None, ["os", "system"], {"_target_": "canary_module.called"})
        )
    name = rng.choice(MODULES)
    found: Any = sys.modules[name]
    for _ in range(rng.randint(1, 4)):
        names = [key for key in dir(found) if not key.startswith("__") or rng.random() < 0.1]
        if not names:
            break
        part = rng.choice(names)
        name = f"{name}.{part}"
        found = getattr(found, part, None)
        if not isinstance(found, (type, types.ModuleType, types.FunctionType)):
            break
    return name


def _damage(rng: random.Random, text: str) -> str:
    start = rng.randrange(len(text))
    end = min(len(text), start + int(rng.expovariate(1 / 30)))
    return rng.choice((
        text[:start] + text[end:],
        text[:end] + text[start:],
        text[:start] + rng.choice(TEXTS) + text[start:],
        text[:start] + chr(rng.randrange(0x120)) + text[start:],
        "\n".join([*text[:start].split("\n"), rng.choice(LINES), *text[start:].split("\n")]),
        f"{rng.choice(LINES)}\n{text}",
    ))  # fmt: skip


if __name__ == "__main__":
    sys.dont_write_bytecode = True  # modules are imported while a config is read
    _classes()  # before the first case, as MODULES
    main("configs", write, read)
