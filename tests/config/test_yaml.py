"""YAML: what is saved reads back as the same config."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn

from dn_detr.config import ConfigError, LazyConfig, instantiate
from dn_detr.config import LazyCall as L
from dn_detr.config.nodes import to_node

TRICKY = ["1e-4", "1", "0x1f", "1:30", "yes", "null", "~", "2020-01-01", "", " ", "inf"]
# Without line breaks that YAML does not keep; see below.
TEXT = st.text().filter(lambda text: not set(text) & set("\x85\u2028\u2029"))
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    TEXT.filter(lambda text: "${" not in text and text != "???"),
    st.sampled_from([*TRICKY, "é", "漢字 🙂", "a: b", "# c", "line\nbreak\r\n", "-"]),
)
KEYS = st.one_of(TEXT.filter(lambda key: 0 < len(key) < 6 and "${" not in key), st.integers())
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3),
    ),
    max_leaves=12,
)


def same(left: Any, right: Any) -> bool:
    """Equality that tells 1 from True and 1.0, and the order of keys."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def plain(cfg: Any) -> Any:
    return OmegaConf.to_container(cfg, resolve=True)


def reload(cfg: Any, path: Path, *, resolve: bool = False) -> Any:
    LazyConfig.save(cfg, path, resolve=resolve)
    return LazyConfig.load(path)


@settings(max_examples=120, deadline=None)
@given(data=st.dictionaries(KEYS, VALUES, max_size=4))
@pytest.mark.parametrize("resolve", [False, True])
def test_any_plain_data_survives_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, data: dict[Any, Any], resolve: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    assert same(plain(reload(to_node(data), path, resolve=resolve)), data)


def test_nan_survives(tmp_path: Path) -> None:
    cfg = reload(to_node({"a": float("nan"), "b": -math.inf}), tmp_path / "c.yaml")
    assert math.isnan(cfg.a) and cfg.b == -math.inf


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="\\$b{}a", max_size=8))
def test_resolved_text_is_not_interpolated_again(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    escaped = text.replace("\\", "").replace("${", "\\${")
    cfg = to_node({"a": escaped, "reference": "${a}", "joined": "<${a}>"})
    expected = plain(cfg)
    path = tmp_path_factory.getbasetemp() / "escaped.yaml"
    assert plain(reload(cfg, path, resolve=True)) == expected


def test_interpolation_is_kept_or_resolved_on_request(tmp_path: Path) -> None:
    cfg = to_node({"a": 1, "b": "${a}", "c": ("${a}", "x${a}"), "d": "${e}", "e": {"f": "${a}"}})
    kept = reload(cfg, tmp_path / "kept.yaml")
    kept.a = 5
    assert plain(kept) == {"a": 5, "b": 5, "c": [5, "x5"], "d": {"f": 5}, "e": {"f": 5}}
    resolved = reload(cfg, tmp_path / "resolved.yaml", resolve=True)
    resolved.a = 5
    assert plain(resolved) == {"a": 5, "b": 1, "c": [1, "x1"], "d": {"f": 1}, "e": {"f": 1}}


def test_mandatory_value_stays_mandatory(tmp_path: Path) -> None:
    cfg = reload(to_node({"a": {"b": "???"}}), tmp_path / "c.yaml", resolve=True)
    with pytest.raises(ConfigError, match=r"a\.b: is mandatory"):
        instantiate(cfg)


def test_model_runs_again_from_its_yaml(tmp_path: Path) -> None:
    cfg = to_node(
        {"width": 3, "model": L(nn.Linear)(in_features="${..width}", out_features="${width}")}
    )
    for resolve in (False, True):
        again = instantiate(reload(cfg, tmp_path / "c.yaml", resolve=resolve).model)
        assert (again.in_features, again.out_features) == (3, 3)


def test_class_as_a_value_is_saved_by_name(tmp_path: Path) -> None:
    cfg = to_node({"norm": nn.BatchNorm2d, "call": {"_target_": nn.ReLU}})
    again = instantiate(reload(cfg, tmp_path / "c.yaml"))
    assert again["norm"] is nn.BatchNorm2d
    assert isinstance(again["call"], nn.ReLU)


def local_function() -> None:
    """A function of a module that other processes may not import under this name."""


@pytest.mark.parametrize("value", [lambda: 1, functools.partial(int, "3")])
def test_callable_without_a_name_cannot_be_saved(tmp_path: Path, value: Any) -> None:
    cfg = to_node({"optimizer": {"rules": [value]}})
    with pytest.raises(ConfigError, match=r"optimizer\.rules\.0: .*named function"):
        LazyConfig.save(cfg, tmp_path / "c.yaml")
    assert not (tmp_path / "c.yaml").exists()


@pytest.mark.parametrize("value", [object(), Path("x"), 1j, b"x", nn.ReLU()])
def test_object_without_a_yaml_form_cannot_be_saved(value: Any) -> None:
    remedy = rf"L\({type(value).__name__}\)\(\.\.\.\)"
    with pytest.raises(ConfigError, match=rf"model\.thing: .*cannot be written to YAML.*{remedy}"):
        LazyConfig.to_yaml(to_node({"model": {"thing": value}}))


@pytest.mark.parametrize("text", ["a\x85b", "\u2028", "\u2029"])
def test_line_break_that_yaml_does_not_keep_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"a\.b: .*line break that YAML does not keep"):
        LazyConfig.to_yaml(to_node({"a": {"b": text}}))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"a": "${nope}"}, r"a: cannot resolve .*'nope' not found"),
        ({"a": {"b": "${c}"}, "c": {"d": "${a}"}}, r"(a\.b|c\.d): cannot resolve"),
        ({"a": "${b}", "b": "${a}"}, r"a: cannot resolve"),
    ],
)
def test_broken_interpolation_is_named_when_resolving(cfg: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LazyConfig.to_yaml(to_node(cfg), resolve=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "c.yaml"),
        ("a: !!python/object/apply:os.system ['true']\n", "has a tag"),
        ("a: !!binary aGVsbG8=\n", "has a tag"),
        ("a: 1\nb: 2\na: 3\n", "duplicate key a"),
        ("- 1\n", "must be a mapping"),
        ("a: &x [*x]\n", "has an alias, *x"),
        ("1: a\ntrue: b\n", "a key is written twice"),
        ("1: a\n0x1: b\n", "a key is written twice"),
        ("x: [{1.0: a, 1: b}]\n", "a key is written twice"),
        ("<<: {a: 1}\nb: 2\n", "is <<"),
        (f"a: {'9' * 6000}\n", "c.yaml"),
        (f"a: -0x{'f' * 2000}\n", "a: is a number of 8000 bits"),
        (f"{'[' * 5000}\n", "nested deeper than 50"),
        (f"{'- ' * 5000}a\n", "nested deeper than 50"),
        (f"{'{a: ' * 5000}\n", "nested deeper than 50"),
        ("a: b # comment\n" + "#" * 2**17, "larger than 131072 bytes"),
        (f"a: {'x' * 4097}\n", "a value of 4097 characters"),
        (f"a: {'${' * 1500}\n", "or 1000 ${...}"),
        (f"a: [{'1,' * 5000}]\n", "more than 5000 keys and values"),
        (f"{'k' * 1001}: a\n", "is a key of 1001 characters"),
        ("a: '${'\n", "not a valid YAML config"),
        ("null: 1\n", "not a valid YAML config"),
        ("? [1]\n: 2\n", "not a valid YAML config"),
        ("a: !tuple [3]\n", "has a tag"),
        ("\x00", "not a valid YAML config"),
    ],
)
def test_bad_yaml_is_an_error_with_its_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml") as caught:
        LazyConfig.load(path)
    assert message in str(caught.value)


def test_hand_written_yaml_reads_as_expected(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("base: {a: 1, b: 1e-4}\n1: {2: }\nday: 2020-01-01\n")
    base = {"a": 1, "b": 1e-4}
    assert plain(LazyConfig.load(path)) == {"base": base, 1: {2: None}, "day": "2020-01-01"}


LEVELS = range(1, 30)


@pytest.mark.parametrize(
    "data",
    [
        {f"a{i}": f"${{a{i - 1}}}${{a{i - 1}}}" for i in LEVELS},
        {f"a{i}": [f"${{a{i - 1}}}", {"b": f"${{...a{i - 1}}}"}] for i in LEVELS},
        {"l": ["text", *(f"${{l[+{i - 1}]}}${{l.0_{i - 1}}}" for i in LEVELS)]},
        {"l": ["text", *(f"${{.{i - 1}}}${{l[{i - 1}]}}" for i in LEVELS)]},
        {f"a{i}": f"${{b.a{i - 1}}}${{b.a{i - 1}}}" for i in LEVELS} | {"b": "${c}", "c": "${}"},
        {"k": "a", **{f"a{i}": f"${{${{k}}{i - 1}}}${{${{k}}{i - 1}}}" for i in LEVELS}},
        {"l": {f"a{i}": f"${{l.${{k}}{i - 1}}}" * 2 for i in LEVELS}, "k": "a"},
        {f"a{i}": f"${{a{i + 1}}}" for i in range(900)},
        {"a": "${b} " * 600, "b": {f"{i:0900}": 1 for i in range(50)}},
    ],
)
def test_references_that_multiply_a_config_are_refused(tmp_path: Path, data: Any) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"a0": "text", **data}))
    with pytest.raises(ConfigError, match=r"lead in a circle, or to too much|is not a valid YAML"):
        LazyConfig.load(path)


def test_fifo_and_device_are_no_configs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "device.yaml").symlink_to("/dev/zero")
    for name in ("fifo", "device"):
        with pytest.raises(ConfigError, match=f"{name}.yaml does not exist, or is no file"):
            LazyConfig.load(tmp_path / f"{name}.yaml")


def test_a_call_that_was_forgotten_is_named():
    cfg = to_node({"part": L(nn.ReLU)})
    with pytest.raises(ConfigError, match=r"part: (L\(.*ReLU\)) is not called: write \1\(\)"):
        LazyConfig.to_yaml(cfg)


@pytest.mark.parametrize(
    "text",
    ["a: " + ":".join(["1"] * 400) + ".5", 'a: "\\ud800"'],
    ids=["a number beyond floats", "half a character"],
)
def test_a_value_that_nothing_can_hold_is_an_error_with_the_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml: "):
        LazyConfig.load(file)


def test_an_index_of_thousands_of_digits_is_no_traceback(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("a: [1]\nb: ${a." + "9" * 4000 + "}\n")
    with pytest.raises(ConfigError, match="b: cannot resolve"):
        LazyConfig.to_yaml(LazyConfig.load(file), resolve=True)
