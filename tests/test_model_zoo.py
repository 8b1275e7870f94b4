"""Models by name: the list, the cards, building one, and the page that is made of them."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

import dn_detr
from dn_detr.config import ConfigError, get_config, instantiate
from dn_detr.layers import attend
from dn_detr.model_zoo import (
    FLOP_FORMULAS,
    ModelSize,
    get_model,
    list_models,
    model_size,
)
from dn_detr.modeling import Detector
from dn_detr.ops import ms_deform_attn, ms_deform_attn_fused
from tools import make_model_zoo
from tools.make_model_zoo import model_card, parse_card

NEEDS_TIMM = "dn_detr_swin_t_50ep"
PUBLISHED_MODELS = {
    "dab_deformable_detr_r50_50ep",
    "dab_deformable_detr_r50_two_stage_50ep",
    "dab_detr_r101_50ep",
    "dab_detr_r101_dc5_50ep",
    "dab_detr_r50_3pat_50ep",
    "dab_detr_r50_50ep",
    "dab_detr_r50_dc5_3pat_50ep",
    "dab_detr_r50_dc5_50ep",
    "dn_deformable_detr_r101_50ep",
    "dn_deformable_detr_r50_12ep",
    "dn_deformable_detr_r50_24ep",
    "dn_deformable_detr_r50_50ep",
    "dn_deformable_encoder_only_r101_12ep",
    "dn_deformable_encoder_only_r50_12ep",
    "dn_deformable_encoder_only_r50_50ep",
    "dn_detr_r101_12ep",
    "dn_detr_r101_50ep",
    "dn_detr_r101_dc5_3pat_12ep",
    "dn_detr_r101_dc5_50ep",
    "dn_detr_r50_12ep",
    "dn_detr_r50_50ep",
    "dn_detr_r50_dc5_12ep",
    "dn_detr_r50_dc5_3pat_12ep",
    "dn_detr_r50_dc5_50ep",
    NEEDS_TIMM,
}
SIZED = {"digits_dn_deformable_detr", "dn_detr_r50_50ep"}  # all of them in a slow test
TINY = (
    "model.backbone.name=resnet18",
    "model.neck.in_channels=[512]",
    "model.transformer.encoder.num_layers=1",
    "model.transformer.decoder.num_layers=1",
    "model.num_queries=7",
)
CARD = """Some-DETR, 50 epochs: 44.4 AP on COCO val2017.

Prose, which may say anything: 12.3 AP.

Row: Some-DETR, the row of a name
    that is long
Source: who prints it, https://example.org/README
Weights: a.pth (authors), b.pth (detrex)
Licence: Apache-2.0
"""


@pytest.mark.parametrize("arguments", [(None,), ("dn_detr_r50_50ep", None, "cpu", "a=1")])
def test_arguments_of_a_wrong_type_are_refused(arguments):
    with pytest.raises(TypeError, match=r"list_models|must be a list"):
        get_model(*arguments)


def test_the_zoo_has_the_published_models():
    assert set(list_models()) >= PUBLISHED_MODELS
    assert list_models() == sorted(list_models())


def test_importing_the_package_imports_neither_the_zoo_nor_torch():
    code = "import sys, dn_detr; assert not {'torch', 'dn_detr.model_zoo'} & set(sys.modules)"
    root = make_model_zoo.PAGE.parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_the_zoo_is_an_attribute_of_the_package():
    assert dn_detr.model_zoo.list_models is list_models
    with pytest.raises(AttributeError, match="modle_zoo"):
        dn_detr.modle_zoo  # noqa: B018


def test_a_model_comes_ready_to_detect_with_overrides_applied():
    model = get_model("dn_detr_r50_50ep", overrides=[*TINY, "model.num_classes=3"])
    assert isinstance(model, Detector) and not model.training
    with torch.no_grad():
        outputs = model.forward_tensors(torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 64).bool())
    assert outputs["pred_logits"].shape == (1, 7, 3)


def test_a_model_goes_to_the_device():
    model = get_model("dn_detr_r50_50ep", device="meta", overrides=TINY)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_model_has_the_weights_of_the_checkpoint(tmp_path):
    trained = get_model("dab_detr_r50_50ep", overrides=TINY)
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    loaded = get_model("dab_detr_r50_50ep", tmp_path / "model.safetensors", overrides=TINY)
    expected = trained.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("function", [get_model, model_size])
def test_a_wrong_name_gets_the_nearest(function):
    with pytest.raises(ConfigError, match="did you mean dn_detr_r50_50ep"):
        function("dn_detr_r50_50epochs")


def test_a_file_of_the_zoo_that_is_no_model_is_refused():
    with pytest.raises(ConfigError, match="no model 'common/train'"):
        get_model("common/train")


def test_an_unknown_override_is_refused():
    with pytest.raises(ConfigError, match="num_classes"):
        get_model("dn_detr_r50_50ep", overrides=["model.num_class=3"])


@pytest.mark.parametrize("name", list_models())
def test_the_card_agrees_with_the_config(name):
    card, cfg = model_card(name), get_config(name)
    assert card.name == name and card.epochs == cfg.train.epochs
    assert cfg.train.output_dir == f"output/{name}"
    assert card.ap is None or 32 < card.ap < 59  # 32.8 and 58.5 are the least and the greatest
    if name not in PUBLISHED_MODELS:
        return
    backbone = str(cfg.model.backbone.name)
    if backbone.startswith("resnet"):
        assert f"R{backbone[6:]}" in card.model and f"_r{backbone[6:]}_" in name
        assert ("DC5" in card.model) == ("_dc5_" in name) == cfg.model.backbone.dilation
        strides = list(cfg.model.neck.in_strides)
        assert strides[-1] == (16 if cfg.model.backbone.dilation else 32)
    patterns = 3 if "_3pat_" in name or "encoder_only" in name else 0
    assert cfg.model.num_patterns == patterns
    assert (cfg.model.denoising is None) == name.startswith("dab_")


def test_a_twelve_epoch_schedule_drops_before_its_last_epoch():
    rule = instantiate(get_config("dn_detr_r50_12ep").lr_schedule)
    assert [rule(epoch, 12) for epoch in (0, 10.99, 11)] == pytest.approx([1, 1, 0.1])


def test_a_card_is_read_from_the_docstring():
    card = parse_card("some", CARD)
    assert (card.model, card.epochs, card.ap) == ("Some-DETR", 50, 44.4)
    assert card.row == "Some-DETR, the row of a name that is long"
    assert (card.source, card.url) == ("who prints it", "https://example.org/README")
    assert card.weights == ("a.pth (authors)", "b.pth (detrex)")
    assert card.licence == "Apache-2.0"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("50 epochs", "fifty epochs", "it starts 'Some-DETR, fifty"),
        (": 44.4 AP on COCO val2017", "", "it starts"),
        (": 44.4 AP on COCO val2017", "; no published AP", "Row and Source"),
        ("Row:", "Line:", "Line is no field"),
        ("https://example.org/README", "somewhere", "Source must be"),
        ("Licence: Apache-2.0", "", "need the field Licence"),
        ("a.pth (authors), b.pth (detrex)", "none published", "need the field Licence"),
        ("12.3 AP.\n\n", "12.3 AP.\n", "a blank line must separate Row"),
        ("Licence:", "Row: again\nLicence:", "there twice"),
    ],
)
def test_a_malformed_card_is_refused(old, new, message):
    with pytest.raises(ValueError, match=message):
        parse_card("some", CARD.replace(old, new))


def test_a_malformed_card_names_the_file(monkeypatch, tmp_path):
    path = tmp_path / "dn_detr_r50_50ep.py"
    path.write_text('"""A model."""\n')
    monkeypatch.setattr(make_model_zoo, "zoo_path", lambda name: path)
    with pytest.raises(ConfigError, match=r"dn_detr_r50_50ep\.py: the docstring is no model card"):
        model_card("dn_detr_r50_50ep")


def _flops(function, *inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        function(*inputs)
    return counter.get_total_flops()


def test_deformable_attention_counts_five_multiply_adds_per_sample_and_channel():
    with torch.device("meta"):
        value, locations = torch.empty(2, 20, 3, 4), torch.empty(2, 7, 3, 2, 5, 2)
        shapes, starts = torch.empty(2, 2).long(), torch.empty(2).long()
        references, logits = torch.empty(2, 7, 2, 4), torch.empty(2, 7, 3, 2 * 5)
    samples = 2 * 7 * 3 * 2 * 5
    flops = _flops(ms_deform_attn, value, shapes, starts, locations, locations[..., 0])
    assert flops == 2 * 5 * samples * 4
    fused = (value, shapes, starts, references, locations, logits)
    assert _flops(ms_deform_attn_fused, *fused) == flops
    padding_mask = torch.zeros(2, 20, dtype=torch.bool, device="meta")
    assert _flops(ms_deform_attn_fused, *fused, padding_mask) == flops


def test_masked_attention_counts_both_products():
    query, key = torch.empty(2, 7, 32, device="meta"), torch.empty(2, 11, 32, device="meta")
    mask = torch.zeros(2, 1, 11, dtype=torch.bool, device="meta")
    flops = _flops(partial(attend, num_heads=4, mask=mask), query, key, key)
    assert flops == 2 * (2 * 7 * 11 * 32) * 2


def test_the_size_of_a_model_counts_multiply_adds_once():
    """Alone, torchvision's ResNet-50 has 4.09e9 at 224 x 224, classifier included."""
    size = model_size("dab_detr_r50_50ep", image_size=(224, 224))
    assert size.parameters == 43_668_690
    assert 4.09e9 < size.multiply_adds < 4.09e9 + 5e9


@pytest.mark.slow
def test_the_page_is_current():
    pytest.importorskip("timm")
    assert make_model_zoo.main(["--check"]) == 0, "run python tools/make_model_zoo.py"


@pytest.mark.parametrize("name", list_models())
def test_the_page_has_what_the_config_says(name):
    size = model_size(name) if name in SIZED else ModelSize(0, 0)
    cells = make_model_zoo.table_row(model_card(name), size)
    row = f"| {' | '.join(cells if name in SIZED else cells[:-2])} |"
    assert row in make_model_zoo.PAGE.read_text(), "run python tools/make_model_zoo.py"


def test_the_page_has_no_other_models():
    page = make_model_zoo.PAGE.read_text()
    assert re.findall(r"^\| \[`(\w+)`\]", page, re.MULTILINE) == list_models()


def test_a_page_that_is_not_current_is_an_error(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(make_model_zoo, "PAGE", tmp_path / "model_zoo.md")
    monkeypatch.setattr(make_model_zoo, "list_models", lambda: ["digits_dn_deformable_detr"])
    assert make_model_zoo.main(["--check"]) == 1
    assert "is not current" in capsys.readouterr().err
    assert make_model_zoo.main([]) == make_model_zoo.main(["--check"]) == 0


def test_get_model_fine_tunes_and_logs_what_was_loaded(tmp_path, caplog):
    small = ["model.num_queries=5", "model.backbone.name=resnet18", "model.backbone.weights=null"]
    small += ["model.neck.in_channels=[512]"]
    save_file(
        get_model("dab_detr_r50_50ep", overrides=small).state_dict(), tmp_path / "a.safetensors"
    )
    three = [*small, "model.num_classes=3"]
    with caplog.at_level("INFO", logger="dn_detr"):
        model = get_model(
            "dab_detr_r50_50ep", tmp_path / "a.safetensors", overrides=three, fine_tune=True
        )
    assert model.num_classes == 3 and "tensors keep their initial values" in caplog.text
    with pytest.raises(ValueError, match="80 classes"):
        get_model("dab_detr_r50_50ep", tmp_path / "a.safetensors", overrides=three)
