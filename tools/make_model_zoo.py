"""Write docs/model_zoo.md, the table of all models, from the configs.

    python tools/make_model_zoo.py
    python tools/make_model_zoo.py --check      # write nothing; fail if the page is not current

The texts come from the docstrings of the configs, parameters and GFLOPs from the models, which are
built without memory. Needs timm (`pip install timm`).
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dn_detr.config import ConfigError, LazyConfig, get_config, zoo_path
from dn_detr.model_zoo import ModelSize, list_models, model_size

_ROOT = Path(__file__).resolve().parents[1]
PAGE = _ROOT / "docs" / "model_zoo.md"

_TOP = """\
<!-- Written by tools/make_model_zoo.py; change the docstrings of the configs instead. -->
# Model zoo

Every model is one file of [`configs/`](../configs) or of a [project](../projects). With COCO and
the weights of a row at hand:

    python tools/train_net.py --config-file dn_deformable_detr_r50_50ep.py --eval-only \\
        dataloader.root=/data/coco train.init_checkpoint=checkpoint0049.pth

The published files load as they are; nothing is downloaded by name. In Python:

```python
from dn_detr import model_zoo

model_zoo.list_models()
model = model_zoo.get_model("dn_deformable_detr_r50_50ep", checkpoint="checkpoint0049.pth")
```

"""
_NOTES = """
**AP** is what the linked source prints for COCO val2017, in percent; no number here was measured
with this code. Its row is named as the source names it. "None": no source that we know has a
result of this model and schedule. Where another project trained a model again, or measured the same
weights again, their AP stands beside their file.

**Weights** are file names, as far as they are public, or ids on Hugging Face. "Authors": the
folders that the README files of [DN-DETR](https://github.com/IDEA-Research/DN-DETR),
[DAB-DETR](https://github.com/IDEA-Research/DAB-DETR) and
[DINO](https://github.com/IDEA-Research/DINO) link. "detrex": the releases that its
[model zoo][detrex] and the README files of its projects link. **Licence** is that of the repository
that publishes the weights.

**Parameters** include the frozen ones, with 80 classes (10 for the digits). **GFLOPs** are for
detecting in one image of 800 x 1066 pixels, which is what the test transform makes of a photograph
of 640 x 480; a multiplication with an addition counts once, as in the papers. Convolutions, matrix
products (attention included) and the sampling of deformable attention are counted; denoising
queries are not, they exist in training only. Those of Faster R-CNN depend on the image.

The papers print more for the dense models: 94 for DAB- and DN-DETR-R50, 174 for R101, 202 and 282
for their DC5 versions. DETR's numbers are averages over the first 100 validation images (its
appendix A.3), and between R50 and R101 they grow by 66, here by 63: those images are some 4 %
larger. DAB-DETR's grow by 80; its authors warn that counting scripts differ. For the deformable
encoder only, the paper prints 195, less than backbone, neck and encoder need here (213) without any
decoder, and the decoder attends from 900 queries to every cell of four levels.

[detrex]: https://github.com/IDEA-Research/detrex/blob/main/docs/source/tutorials/Model_Zoo.md
"""


_TITLE = re.compile(
    r"(?P<model>\S.*), (?P<epochs>\d+) epochs"
    r"(: (?P<ap>\d\d\.\d) AP on COCO val2017|; no published AP)\."
)
_FIELDS = ("Row", "Source", "Weights", "Licence")
_FIELD = re.compile(r"^([A-Z]\w+): +", re.MULTILINE)
_LINK = re.compile(r"(?P<text>\S.*), (?P<url>https://\S+)")


@dataclass(frozen=True)
class ModelCard:
    """What the docstring of a config says of published results.

    Attributes:
        name: of the config, without `.py`.
        model: in words, such as "DN-DETR-R50-DC5, 3 patterns".
        epochs: of its training.
        ap: on COCO val2017 in percent, as published; None where no result is.
        row: of the table that has the result; "" without one.
        source: who prints it; "" without a result.
        url: where; "" without a result.
        weights: file names or Hugging Face ids of published weights, each with whose they are.
        licence: of these weights; "" without any.
    """

    name: str
    model: str
    epochs: int
    ap: float | None
    row: str
    source: str
    url: str
    weights: tuple[str, ...]
    licence: str


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


def model_card(name: str) -> ModelCard:
    """Read what is published of a model; its config does not run.

    Args:
        name: one of `list_models()`.

    Raises:
        ConfigError: no such model, or a docstring that is no card; the message names the file.
    """
    path = zoo_path(name)
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    try:
        return parse_card(path.stem, docstring)
    except ValueError as error:
        raise ConfigError(f"{path}: the docstring is no model card: {error}") from None


def parse_card(name: str, docstring: str) -> ModelCard:
    """Parse a docstring: the title line, then fields `Row: ...`, each ended by another or a gap.

    Raises:
        ValueError: says what is missing or wrong.
    """
    first = docstring.partition("\n")[0]
    title = _TITLE.fullmatch(first)
    if title is None:
        raise ValueError(
            f"it starts {first!r}, not as '<model>, 50 epochs: 44.4 AP on COCO val2017.' or "
            "'<model>, 50 epochs; no published AP.'"
        )
    fields = _fields(docstring)
    published = {"Row", "Source"} if title["ap"] else set()
    if {"Row", "Source"} & fields.keys() != published:
        raise ValueError("a published AP needs the fields Row and Source, and they need it")
    link = _LINK.fullmatch(fields["Source"]) if title["ap"] else None
    if title["ap"] and link is None:
        raise ValueError(f"Source must be '<who>, https://...', not {fields['Source']!r}")
    weights = fields.get("Weights", "none published")
    names = () if weights == "none published" else tuple(weights.split(", "))
    if bool(names) != ("Licence" in fields):
        raise ValueError("published Weights need the field Licence, and it needs them")
    return ModelCard(
        name=name,
        model=title["model"],
        epochs=int(title["epochs"]),
        ap=float(title["ap"]) if title["ap"] else None,
        row=fields.get("Row", ""),
        source=link["text"] if link else "",
        url=link["url"] if link else "",
        weights=names,
        licence=fields.get("Licence", ""),
    )


def _fields(docstring: str) -> dict[str, str]:
    """Texts of the fields by name, wrapped lines joined."""
    fields: dict[str, str] = {}
    for paragraph in docstring.split("\n\n"):
        before, *parts = _FIELD.split(paragraph)
        if before.strip() and parts:
            raise ValueError(f"a blank line must separate {parts[0]} from the text before it")
        for key, text in zip(parts[::2], parts[1::2], strict=True):
            if key not in _FIELDS or key in fields:
                raise ValueError(f"{key} is no field, or there twice; there are {_FIELDS}")
            fields[key] = " ".join(text.split())
    return fields


def backbone_name(name: str) -> str:
    """The backbone of a model as its config has it: "resnet50", "resnet50, DC5"."""
    backbone = get_config(name).model.backbone
    return f"{backbone.name}, DC5" if backbone.get("dilation") else str(backbone.name)


def table_row(card: ModelCard, size: ModelSize) -> list[str]:
    """Cells of a model's row in the table, as Markdown."""
    return [
        f"[`{card.name}`]({Path('..') / zoo_path(card.name).relative_to(_ROOT)})",
        card.model,
        backbone_name(card.name),
        str(card.epochs),
        f"[{card.ap}]({card.url})" if card.ap else "none",
        card.row,
        "<br>".join(card.weights) or "none",
        card.licence,
        f"{size.parameters / 1e6:.2f}",
        "" if size.multiply_adds is None else f"{size.multiply_adds / 1e9:.0f}",
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
