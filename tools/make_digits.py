"""Make the demo data set: handwritten digits on photographs, in COCO's layout.

    python tools/make_digits.py --root datasets/digits
    python tools/make_digits.py --root datasets/digits --num-train 5000 --digits-per-image 3 9

Needs scikit-learn (`pip install 'dn_detr[demo]'`). A data set of the same settings is reused.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence

from dn_detr.data.digits import write_digits_dataset


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; defaults are those of `write_digits_dataset`."""
    defaults = inspect.signature(write_digits_dataset).parameters
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--root", required=True, help="folder of the data set")
    for name, meaning in {
        "num_train": "training images",
        "num_val": "validation images",
        "image_size": "side of an image, pixels",
        "seed": "of all random draws",
    }.items():
        parser.add_argument(option(name), type=int, default=defaults[name].default, help=meaning)
    for name, meaning in {
        "digits_per_image": "fewest and most digits in an image",
        "digit_size": "smallest and largest height of a digit, pixels",
    }.items():
        parser.add_argument(
            option(name), type=int, nargs=2, default=defaults[name].default, help=meaning
        )
    parser.add_argument(
        "--max-overlap",
        type=float,
        default=defaults["max_overlap"].default,
        help="how much of a box another may cover, in [0, 1)",
    )
    return parser.parse_args(argv)


def option(name: str) -> str:
    """`num_train` -> `--num-train`."""
    return "--" + name.replace("_", "-")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the data set and say where it is; returns the exit code."""
    settings = vars(parse_arguments(argv))
    settings["digits_per_image"] = tuple(settings["digits_per_image"])
    settings["digit_size"] = tuple(settings["digit_size"])
    try:
        root = write_digits_dataset(**settings)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{settings['num_train']} + {settings['num_val']} images lie in {root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
