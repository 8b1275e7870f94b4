"""Train, evaluate or resume what a config describes.

    python tools/train_net.py --config-file configs/dn_deformable_detr_r50_50ep.py \\
        train.output_dir=output/run1 dataloader.train.total_batch_size=8

Ten iterations on a CPU, with small images:

    python tools/train_net.py --config-file dn_deformable_detr_r50_50ep.py train.device=cpu \\
        train.max_iter=10 dataloader.train.total_batch_size=2 dataloader.image_scale=0.4

Again what a run did, with the code of a project of yours that its config names:

    python tools/train_net.py --config-file output/run1/config.yaml --trust my_project \\
        train.output_dir=output/run2
"""

from __future__ import annotations

from dn_detr.signals import exit_when_signalled

if __name__ in ("__main__", "__mp_main__"):  # the command, and processes that it starts
    exit_when_signalled()  # before the imports, which take seconds

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial

from dn_detr.config import LazyConfig
from dn_detr.config.command_line import add_config_arguments, load_config
from dn_detr.engine import (
    EXIT_DONE,
    EXIT_ERROR,
    EXIT_SIGNAL,
    EXIT_STOPPED,
    KilledError,
    ProcessFailure,
    Stopped,
    TrainSettings,
    evaluate,
    launch,
    train,
)
from dn_detr.errors import UserError, user_message


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code, 0 only when all went well.

    1: an error; 2: a wrong option; 75: stopped on request, a training after saving: `--resume`
    continues; 128 + N: ended by a second signal N, without saving.
    """
    arguments = _parser().parse_intermixed_args(argv)
    try:
        _run(arguments)
    except KeyboardInterrupt:  # from a program that calls this function
        return _report("interrupted", EXIT_SIGNAL + signal.SIGINT)
    except Stopped as stop:
        print(stop, file=sys.stderr, flush=True)
        return EXIT_STOPPED
    except KilledError as killed:
        return _report(str(killed), killed.exit_code)
    except ProcessFailure as failure:
        return _report(str(failure))
    except UserError as error:
        return _report(user_message(error))
    return EXIT_DONE


def _run(arguments: argparse.Namespace) -> None:
    cfg = load_config(arguments)
    if arguments.print_config:
        print(LazyConfig.to_yaml(cfg, resolve=True), end="", flush=True)
        return
    command = evaluate if arguments.eval_only else partial(train, resume=arguments.resume)
    launch(command, arguments.num_gpus, cfg, device=TrainSettings.from_config(cfg).device)


def _report(message: str, exit_code: int = EXIT_ERROR) -> int:
    where = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
    print(f"error{where}: {message}", file=sys.stderr, flush=True)
    return exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description="Train, evaluate or resume what a config describes.",
    )
    add_config_arguments(parser)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--eval-only",
        action="store_true",
        help="evaluate train.init_checkpoint (default: the last checkpoint of train.output_dir)",
    )
    mode.add_argument("--resume", action="store_true", help="continue the run in train.output_dir")
    mode.add_argument(
        "--print-config", action="store_true", help="print the config after overrides and exit"
    )
    parser.add_argument(
        "--num-gpus",
        type=int,
        metavar="N",
        help="processes to start, one GPU each (CPU processes with train.device=cpu)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
