"""The ResNet backbone against torchvision's, and how it takes pretrained weights."""

from __future__ import annotations

import copy
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision

from dn_detr.modeling import ResNet
from dn_detr.modeling.backbones import resnet
from dn_detr.structures import pad_images


@pytest.fixture(scope="module")
def published() -> torch.nn.Module:
    """A torchvision ResNet-18 with statistics that are not the default ones."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


@pytest.fixture
def weights_file(published, tmp_path) -> Path:
    path = tmp_path / "resnet18.pth"
    torch.save(published.state_dict(), path)
    return path


def _no_padding(images: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool)


def test_features_are_torchvisions(published, weights_file):
    backbone = ResNet("resnet18", weights=str(weights_file))
    assert backbone.load_pretrained()
    images = torch.randn(2, 3, 70, 90)
    x = published.maxpool(published.relu(published.bn1(published.conv1(images))))
    expected = []
    for stage in (published.layer1, published.layer2, published.layer3, published.layer4):
        x = stage(x)
        expected.append(x)
    for ours, theirs in zip(backbone(images, _no_padding(images)), expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "dilation"), [("resnet18", False), ("resnet50", False), ("resnet50", True)]
)
def test_channels_and_strides_are_those_of_the_maps(name, dilation):
    backbone = ResNet(name, out_features=["layer1", "layer4"], dilation=dilation).eval()
    images = torch.randn(1, 3, 64, 96)
    for features, channels, stride in zip(
        backbone(images, _no_padding(images)),
        backbone.out_channels,
        backbone.out_strides,
        strict=True,
    ):
        assert features.shape[1:] == (channels, 64 // stride, 96 // stride)


@pytest.mark.parametrize(("height", "width"), [(45, 61), (75, 47), (33, 62)])
def test_padding_does_not_reach_the_features(weights_file, height, width):
    backbone = ResNet("resnet18", weights=str(weights_file))
    backbone.load_pretrained()
    small, large = torch.randn(3, height, width), torch.randn(3, 99, 130)
    alone = backbone(small[None], _no_padding(small[None]))
    batch = backbone(*pad_images([small, large]))
    for a, b in zip(alone, batch, strict=True):
        height, width = a.shape[-2:]
        torch.testing.assert_close(b[:1, :, :height, :width], a, rtol=1e-4, atol=1e-4)


def test_padding_is_seen_if_it_is_not_masked(published, weights_file):
    backbone = ResNet("resnet18", weights=str(weights_file), mask_padding=False)
    backbone.load_pretrained()
    small, large = torch.randn(3, 45, 61), torch.randn(3, 99, 130)
    alone = backbone(small[None], _no_padding(small[None]))[-1]
    batch = backbone(*pad_images([small, large]))[-1][:1, :, : alone.shape[2], : alone.shape[3]]
    assert (batch - alone).abs().max() > 0.01


def test_maps_without_padding_are_the_same_whether_it_is_looked_for(weights_file, monkeypatch):
    backbone = ResNet("resnet18", weights=str(weights_file))
    backbone.load_pretrained()
    images = torch.randn(2, 3, 45, 61)
    expected = backbone(images, _no_padding(images))
    monkeypatch.setattr(resnet, "may_hold_padding", lambda mask: True)
    for a, b in zip(backbone(images, _no_padding(images)), expected, strict=True):
        assert torch.equal(a, b)


def test_features_in_half_precision_are_near(weights_file):
    backbone = ResNet("resnet18", weights=str(weights_file))
    backbone.load_pretrained()
    images = torch.randn(2, 3, 45, 61)
    expected = backbone(images, _no_padding(images))
    with torch.autocast("cpu", torch.bfloat16):
        features = backbone(images, _no_padding(images))
    for a, b in zip(features, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("batch_norm", ["frozen", "trainable"])
def test_gradients_are_torchvisions(published, weights_file, batch_norm):
    backbone = ResNet("resnet18", weights=str(weights_file), batch_norm=batch_norm)
    backbone.load_pretrained()
    backbone.double().eval()  # in float32 the sign of a cell beside zero is a matter of luck
    images = torch.randn(2, 3, 45, 61, dtype=torch.float64)
    backbone(images, _no_padding(images))[-1].sum().backward()
    theirs = copy.deepcopy(published).double()
    x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
    for stage in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
        x = stage(x)
    x.sum().backward()
    trained = {name: p for name, p in backbone.body.named_parameters() if p.requires_grad}
    assert "layer2.0.conv1.weight" in trained
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, theirs.get_parameter(name).grad)


def test_exported_backbone_takes_other_sizes(weights_file):
    backbone = ResNet("resnet18", weights=str(weights_file))
    backbone.load_pretrained()
    height, width = (torch.export.Dim(side, min=33, max=2000) for side in ("height", "width"))
    images = torch.randn(2, 3, 75, 110)
    shapes = ({2: height, 3: width}, {1: height, 2: width})
    exported = torch.export.export(backbone, (images, _no_padding(images)), dynamic_shapes=shapes)
    other = pad_images([torch.randn(3, 45, 131), torch.randn(3, 99, 61)])
    for a, b in zip(exported.module()(*other), backbone(*other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_compiler_finds_one_graph():
    backbone = ResNet("resnet18")
    images, mask = pad_images([torch.randn(3, 45, 61), torch.randn(3, 99, 130)])
    compiled = torch.compile(backbone, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, mask), backbone(images, mask))


@pytest.mark.parametrize(
    ("frozen", "first_trained"),
    [(0, "body.conv1"), (1, "body.layer1"), (2, "body.layer2"), (5, None)],
)
def test_frozen_stages_do_not_train(frozen, first_trained):
    backbone = ResNet("resnet18", frozen_stages=frozen)
    trained = [name for name, p in backbone.named_parameters() if p.requires_grad]
    assert trained[0].startswith(first_trained) if first_trained else not trained


def _kept_shapes(backbone: ResNet, images: torch.Tensor) -> set[tuple[int, ...]]:
    """Shapes of the maps that the backward pass will read."""
    shapes = set()

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 4 and len(x) == len(images):
            shapes.add(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        backbone(images, _no_padding(images))
    return shapes


def test_frozen_stages_keep_no_activations():
    images = torch.randn(2, 3, 64, 64)
    kept = _kept_shapes(ResNet("resnet18", frozen_stages=2), images)
    assert {shape[1] for shape in kept} == {64, 128, 256, 512}
    assert (2, 64, 32, 32) not in kept  # the stem's; layer1's last map is the input of layer2
    assert _kept_shapes(ResNet("resnet18", frozen_stages=5), images) == set()


def test_weights_of_another_architecture_are_refused(weights_file):
    backbone = ResNet("resnet34", weights=str(weights_file))
    with pytest.raises(
        ValueError, match=r"resnet18\.pth.*incomplete[\s\S]*missing[\s\S]*layer1\.2"
    ):
        backbone.load_pretrained()


def test_weights_of_a_deeper_network_are_refused(tmp_path):
    """All tensors of ResNet-18 exist in ResNet-34, with the same shapes."""
    path = tmp_path / "resnet34.pth"
    torch.save(torchvision.models.resnet34().state_dict(), path)
    with pytest.raises(ValueError, match=r"resnet34\.pth[\s\S]*unexpected[\s\S]*layer1\.2"):
        ResNet("resnet18", weights=str(path)).load_pretrained()


def test_missing_file_names_the_choices():
    with pytest.raises(ValueError, match=r"nowhere\.pth.*no such file.*IMAGENET1K_V1"):
        ResNet("resnet18", weights="nowhere.pth").load_pretrained()


def test_file_that_is_no_checkpoint_is_named(tmp_path):
    path = tmp_path / "broken.pth"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"broken\.pth"):
        ResNet("resnet18", weights=str(path)).load_pretrained()


def test_weights_out_of_reach_are_a_loud_warning(monkeypatch, caplog):
    def no_network(self, *args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", no_network)
    assert not ResNet("resnet18", weights="IMAGENET1K_V1").load_pretrained()
    assert "RANDOM WEIGHTS" in caplog.text and "resnet18-f37072fd.pth" in caplog.text


def test_weights_in_the_download_cache_are_used(published, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cache = tmp_path / "checkpoints" / "resnet18-f37072fd.pth"
    cache.parent.mkdir()
    torch.save(published.state_dict(), cache)
    backbone = ResNet("resnet18", weights="IMAGENET1K_V1")
    assert backbone.load_pretrained()
    torch.testing.assert_close(backbone.body.conv1.weight, published.conv1.weight)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"name": "resnet19"}, "resnet19"),
        ({"out_features": ["layer5"]}, "layer5"),
        ({"batch_norm": "sync"}, "sync"),
        ({"dilation": True}, "dilation"),
        ({"frozen_stages": -1}, "frozen_stages -1"),
        ({"frozen_stages": 6}, "frozen_stages 6"),
    ],
)
def test_unknown_settings_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        ResNet(**{"name": "resnet18", **options})
