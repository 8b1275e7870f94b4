"""Write docs/model_zoo.md, the table of all models, from the configs.

    python tools/make_model_zoo.py
    python tools/make_model_zoo.py --check      # write nothing; fail if the page is not current

The texts come from the docstrings of the configs, parameters and GFLOPs from the models, which are
built without memory. Needs timm (`pip install timm`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dn_detr.config import LazyConfig, get_config
from dn_detr.model_zoo import ModelCard, ModelSize, list_models, model_card, model_size

PAGE = Path(__file__).resolve().parents[1] / "docs" / "model_zoo.md"

_TOP = """\
<!-- Written by tools/make_model_zoo.py; change the docstrings of the configs instead. -->
# Model zoo

Every model is one file of [`configs/`](../configs). With COCO and the weights of a row at hand:

    python tools/train_net.py --config-file dn_deformable_detr_r50_50ep.py --eval-only \\
        dataloader.root=/data/coco train.init_checkpoint=checkpoint0049.pth

The published files load as they are; nothing is downloaded by name. In Python:

```python
from dn_detr import model_zoo

model_zoo.list_models()
model = model_zoo.get_model("dn_deformable_detr_r50_50ep", checkpoint="checkpoint0049.pth")
model_zoo.model_card("dn_deformable_detr_r50_50ep").ap  # 49.5
```

"""
_NOTES = """
**AP** is what the linked source prints for COCO val2017, in percent; no number here was measured
with this code. Its row is named as the source names it. "None": no source that we know has a
result of this model and schedule. Where somebody else trained a model again, or measured the same
weights again, their AP stands beside their file.

**Weights** are file names, as far as they are public, or ids on Hugging Face. "Authors": the
folders that the README files of [DN-DETR](https://github.com/IDEA-Research/DN-DETR) and
[DAB-DETR](https://github.com/IDEA-Research/DAB-DETR) link. "detrex": the releases that its
[model zoo][detrex] and the README files of its projects link. **Licence** is that of the repository
that publishes the weights.

**Parameters** include the frozen ones, with 80 classes (10 for the digits). **GFLOPs** are for
detecting in one image of 800 x 1066 pixels, which is what the test transform makes of a photograph
of 640 x 480; a multiplication with an addition counts once, as in the papers. Convolutions, matrix
products (attention included) and the sampling of deformable attention are counted; denoising
queries are not, they exist in training only.

The papers print more for the dense models: 94 for DAB- and DN-DETR-R50, 174 for R101, 202 and 282
for their DC5 versions. DETR's numbers are averages over the first 100 validation images (its
appendix A.3), and between R50 and R101 they grow by 66, here by 63: those images are some 4 %
larger. DAB-DETR's grow by 80; its authors warn that counting scripts differ. For the deformable
encoder only, the paper prints 195, less than backbone, neck and encoder need here (213) without any
decoder, and the decoder attends from 900 queries to every cell of four levels.

[detrex]: https://github.com/IDEA-Research/detrex/blob/main/docs/source/tutorials/Model_Zoo.md
"""


HEADER = [
    "config",
    "model",
    "backbone",
    "epochs",
    "AP",
    "row of the source",
    "published weights",
    "licence",
    "parameters (M)",
    "GFLOPs",
]


def backbone_name(name: str) -> str:
    """The backbone of a model as its config has it: "resnet50", "resnet50, DC5"."""
    backbone = get_config(name).model.backbone
    return f"{backbone.name}, DC5" if backbone.get("dilation") else str(backbone.name)


def table_row(card: ModelCard, size: ModelSize) -> list[str]:
    """Cells of a model's row in the table, as Markdown."""
    return [
        f"[`{card.name}`](../configs/{card.name}.py)",
        card.model,
        backbone_name(card.name),
        str(card.epochs),
        f"[{card.ap}]({card.url})" if card.ap else "none",
        card.row,
        "<br>".join(card.weights) or "none",
        card.licence,
        f"{size.parameters / 1e6:.2f}",
        f"{size.multiply_adds / 1e9:.0f}",
    ]


def make_page() -> str:
    """The whole page."""
    sizes: dict[str, ModelSize] = {}  # by the text of the model, which several schedules share
    rows = [HEADER, ["---"] * len(HEADER)]
    for name in list_models():
        model = LazyConfig.to_yaml(get_config(name).model, resolve=True)
        if model not in sizes:
            sizes[model] = model_size(name)
        rows.append(table_row(model_card(name), sizes[model]))
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return _TOP + table + _NOTES


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail if the page is not current")
    check = parser.parse_args(argv).check
    page = make_page()
    if not check:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page:
        return 0
    print(f"error: {PAGE} is not current; run python tools/make_model_zoo.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
