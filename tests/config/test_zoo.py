"""Finding configs of the zoo."""

from __future__ import annotations

from pathlib import Path

import pytest

from dn_detr.config import (
    ConfigError,
    LazyConfig,
    get_config,
    list_configs,
    resolve_config_file,
    zoo,
    zoo_path,
)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a zoo of its own: returns the folder that holds `dn_detr` and `configs`."""
    (tmp_path / "dn_detr").mkdir()
    (tmp_path / "configs" / "common").mkdir(parents=True)
    (tmp_path / "configs" / "common" / "train.py").write_text("train = dict(seed=1)\n")
    for name in ("dn_detr_r50", "dab_detr_r50"):
        text = f"from .common.train import train\nname = {name!r}\n"
        (tmp_path / "configs" / f"{name}.py").write_text(text)
    monkeypatch.setattr(zoo, "_PACKAGE", tmp_path / "dn_detr")
    monkeypatch.setattr(zoo, "project_folders", list)
    return tmp_path


@pytest.mark.parametrize("name", ["dn_detr_r50", "dn_detr_r50.py"])
def test_name_finds_its_config_with_and_without_suffix(checkout: Path, name: str) -> None:
    assert zoo_path(name) == checkout / "configs" / "dn_detr_r50.py"
    assert get_config(name) == {"train": {"seed": 1}, "name": "dn_detr_r50"}


def test_shared_parts_can_be_loaded(checkout: Path) -> None:
    assert get_config("common/train.py").train.seed == 1


def test_every_call_gives_a_private_copy(checkout: Path) -> None:
    get_config("dn_detr_r50").train.seed = 5
    assert get_config("dn_detr_r50").train.seed == 1


def test_installed_package_has_its_zoo_inside(checkout: Path) -> None:
    (checkout / "configs").rename(checkout / "dn_detr" / "configs")
    (checkout / "configs").mkdir()
    assert zoo_path("dn_detr_r50").parent == checkout / "dn_detr" / "configs"


def test_list_has_the_runnable_configs_only(checkout: Path) -> None:
    assert list_configs() == ["dab_detr_r50.py", "dn_detr_r50.py"]


@pytest.mark.parametrize("name", ["dn_detr_r5", "../configs/absent", "common", "", "/etc/passwd"])
def test_unknown_name_is_an_error(checkout: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="in the zoo"):
        zoo_path(name)


def test_name_cannot_leave_the_zoo(checkout: Path) -> None:
    (checkout / "secret.py").write_text("a = 1\n")
    with pytest.raises(ConfigError, match="in the zoo"):
        zoo_path("../secret.py")


def test_unknown_name_suggests_the_nearest(checkout: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean dn_detr_r50\.py\?"):
        get_config("dn_dter_r50.py")
    with pytest.raises(ConfigError, match=r"which has dab_detr_r50\.py, dn_detr_r50\.py"):
        get_config("zzz")


def test_missing_zoo_names_the_places_tried(checkout: Path) -> None:
    (checkout / "configs").rename(checkout / "elsewhere")
    with pytest.raises(ConfigError, match=r"tried .*dn_detr/configs and .*configs; install"):
        zoo_path("dn_detr_r50")


def test_config_file_is_a_path_or_a_name(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "mine.py").write_text("a = 1\n")
    monkeypatch.chdir(checkout)
    assert resolve_config_file("mine.py") == Path("mine.py")
    assert resolve_config_file("dn_detr_r50") == checkout / "configs" / "dn_detr_r50.py"
    assert resolve_config_file("configs/dn_detr_r50.py") == Path("configs/dn_detr_r50.py")


def test_unknown_config_file_names_both_places(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout / "configs")
    with pytest.raises(ConfigError) as caught:
        resolve_config_file("./dn_detr_r5.py")
    message = str(caught.value)
    assert str(checkout / "configs" / "dn_detr_r5.py") in message
    assert "did you mean dn_detr_r50.py?" in message
    assert f"in the zoo {checkout / 'configs'}" in message


@pytest.mark.parametrize("name", list_configs())
def test_every_config_of_the_zoo_survives_yaml(tmp_path: Path, name: str) -> None:
    cfg = get_config(name)
    resolved = LazyConfig.to_yaml(cfg, resolve=True)
    assert "${" not in resolved
    for text in (LazyConfig.to_yaml(cfg), resolved):
        (tmp_path / "config.yaml").write_text(text)
        again = LazyConfig.load(tmp_path / "config.yaml")
        assert LazyConfig.to_yaml(again, resolve=True) == resolved
