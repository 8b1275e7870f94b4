"""Convert weights: from any layout that the model knows into ours, or into another one.

    python tools/convert_checkpoint.py --config-file dn_detr_r50_50ep \\
        --input checkpoint.pth --output weights/dn_detr_r50

The output is a checkpoint folder for train.init_checkpoint. For the authors' code or detrex:

    python tools/convert_checkpoint.py --config-file dn_detr_r50_50ep --input output/run1 \\
        --to official --output dn_detr_r50.pth
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dn_detr.checkpoint import convert_checkpoint
from dn_detr.config import LazyConfig, instantiate
from dn_detr.config.command_line import add_config_arguments, load_config
from dn_detr.errors import UserError, user_message


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code, 0 only when all went well."""
    arguments = _parser().parse_intermixed_args(argv)
    try:
        _run(arguments)
    except UserError as error:
        print(f"error: {user_message(error)}", file=sys.stderr, flush=True)
        return 1
    return 0


def _run(arguments: argparse.Namespace) -> None:
    cfg = load_config(arguments)
    report = convert_checkpoint(
        instantiate(cfg.model),
        arguments.input,
        arguments.output,
        to=arguments.to,
        ema=arguments.ema,
        force=arguments.force,
        config=LazyConfig.to_yaml(cfg),
    )
    print(f"{arguments.input}: {report.layout} layout, every tensor loaded")
    for note in report.notes:
        print(f"note: {note}")
    print(f"wrote {arguments.output}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Convert weights from any layout that the model knows.",
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--input", required=True, metavar="FILE", help="file or folder with the weights"
    )
    parser.add_argument(
        "--output", required=True, metavar="OUT", help="checkpoint folder (or .pth file) to write"
    )
    parser.add_argument(
        "--to",
        default="dn_detr",
        metavar="LAYOUT",
        help="layout to write: dn_detr (ours, the default), or one of the model: official, detrex",
    )
    parser.add_argument("--ema", action="store_true", help="take the EMA of the file")
    parser.add_argument("--force", action="store_true", help="replace an output that exists")
    return parser


if __name__ == "__main__":
    sys.exit(main())
