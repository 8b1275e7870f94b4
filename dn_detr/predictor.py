"""Detecting objects in images with the model of a run or of the zoo.

predictor = dn_detr.load("output/run1")
found = predictor.predict("photo.jpg", threshold=0.5)
print(found.class_names, found.scores, found.pred_boxes.tensor)
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from dn_detr.checkpoint import (
    CheckpointError,
    find_checkpoint,
    load_model_weights,
    read_manifest,
)
from dn_detr.checkpoint.coco_classes import COCO_NAMES
from dn_detr.checkpoint.manifest import MANIFEST_NAME
from dn_detr.config import LazyConfig, instantiate
from dn_detr.config.lazy_config import load_yaml
from dn_detr.config.zoo import resolve_config_file
from dn_detr.data.image import read_image, upright_rgb
from dn_detr.data.transforms import Transform
from dn_detr.errors import UserError
from dn_detr.model_zoo import list_models
from dn_detr.structures import Instances

logger = logging.getLogger(__name__)

ImageLike: TypeAlias = str | Path | Image.Image | NDArray[np.uint8] | Tensor


class Predictor:
    """A detector with what belongs to it: the transforms of its test images and its class names.

    Args:
        model: takes `list[dict]` and returns `list[{"instances": Instances}]` in evaluation mode.
        transforms: of the images, see `dn_detr.data.transforms`; None = the image as it is.
        class_names: name of each class.
    """

    def __init__(
        self, model: nn.Module, transforms: Transform | None, class_names: Sequence[str]
    ) -> None:
        self.model = model.eval()
        self.transforms = transforms
        self.class_names = list(class_names)

    @overload
    def predict(self, images: ImageLike, threshold: float = 0.0) -> Instances: ...

    @overload
    def predict(self, images: list[ImageLike], threshold: float = 0.0) -> list[Instances]: ...

    def predict(
        self, images: ImageLike | list[ImageLike], threshold: float = 0.0
    ) -> Instances | list[Instances]:
        """Detect objects in one image after the other, as an evaluation with batches of one does.

        Args:
            images: an image or a list of images: a path, an image of Pillow (both are turned
                upright by their EXIF orientation), an array (H, W, 3) uint8 RGB, or a tensor
                (3, H, W) uint8 RGB.
            threshold: detections with a lower score, in [0, 1], are left out.

        Returns:
            For each image `Instances` on the CPU by falling `scores` (n,), with `pred_boxes`
            (XYXY, pixels of the image), `pred_classes` (n,) int64 and `class_names` (n,) str.

        Raises:
            ImageError: a file cannot be read.
            UserError: an array or tensor is no image.
        """
        if isinstance(images, list):
            return [self.predict(image, threshold) for image in images]
        image = _to_pillow(images)
        sample: dict[str, Any] = {"image": image, "height": image.height, "width": image.width}
        if self.transforms is not None:
            sample = self.transforms(sample, random.Random(0))
        sample["image"] = pil_to_tensor(sample["image"])
        with torch.no_grad():
            found: Instances = self.model([sample])[0]["instances"].to("cpu")
        found = found[found.scores >= threshold]
        known = len(self.class_names)
        found.class_names = np.array(
            [
                self.class_names[class_] if class_ < known else f"class {class_}"
                for class_ in found.pred_classes.tolist()
            ],
            dtype=str,
        )
        return found


def load(
    source: str | Path,
    checkpoint: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    class_names: Sequence[str] | None = None,
    trust: str | Iterable[str] = (),
) -> Predictor:
    """Load a trained detector, ready to detect objects in images.

    Args:
        source: the output folder of a run (its best checkpoint, else its last one is used) or a
            checkpoint folder. With `checkpoint`: a model of the zoo by name, or a config file.
        checkpoint: weights for a config; of any code base that is known.
        device: where the model goes.
        class_names: name of each class; None = those of the checkpoint, else COCO's for a model of
            80 classes.
        trust: a package, or several, that the config of a run may name besides the library's own;
            their code runs.

    Raises:
        CheckpointError: no such checkpoint, or one that is damaged or of another model.
        ConfigError: no such config, or one that names a package that is not trusted.
    """
    if checkpoint is None:
        if str(source) in list_models() and not Path(source).exists():
            raise UserError(f"name the weights, too: dn_detr.load({str(source)!r}, CHECKPOINT)")
        folder = Path(source)
        best = folder / "checkpoints" / "best"
        checkpoint = find_checkpoint(best if best.is_dir() else folder)
        manifest = read_manifest(checkpoint)
        if not manifest.config:
            raise UserError(
                f"{checkpoint}: holds weights without a config; name the model too:"
                f" dn_detr.load(NAME_OR_CONFIG_FILE, {str(checkpoint)!r})"
            )
        class_names = manifest.class_names if class_names is None else class_names
        saved = folder / "config.yaml"  # the same config, where a user can read it
        name = saved if saved.is_file() else checkpoint / MANIFEST_NAME
        cfg = load_yaml(manifest.config, name, allow=trust)
    else:
        cfg = LazyConfig.load(resolve_config_file(str(source)), allow=trust)
        if class_names is None:
            with suppress(CheckpointError):  # of another code base
                class_names = read_manifest(find_checkpoint(checkpoint)).class_names
    model: nn.Module = instantiate(cfg.get("model"))
    if not hasattr(model, "num_classes"):
        raise UserError(f"{source}: model in its config is no detector: {type(model).__name__}")
    if class_names is None:
        class_names = COCO_NAMES if model.num_classes == len(COCO_NAMES) else ()
    load_model_weights(model, checkpoint, class_names=class_names)
    transforms = OmegaConf.select(cfg, "dataloader.test.dataset.transforms")
    return Predictor(
        model.to(device), None if transforms is None else instantiate(transforms), class_names
    )


def _to_pillow(image: ImageLike) -> Image.Image:
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, Image.Image):
        return upright_rgb(image)
    if isinstance(image, np.ndarray):
        if image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8:
            return Image.fromarray(image)
    elif isinstance(image, Tensor) and image.ndim == 3 and image.shape[0] == 3:
        if image.dtype == torch.uint8:
            return to_pil_image(image.cpu())
    else:
        raise UserError(f"an image is a path, an image of Pillow, an array or a tensor: {image!r}")
    raise UserError(
        f"an array must be (H, W, 3) uint8 RGB and a tensor (3, H, W) uint8 RGB, not"
        f" {tuple(image.shape)} {image.dtype}"
    )
