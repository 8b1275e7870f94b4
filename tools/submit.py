"""Train on a cluster: submit a training to Slurm, which starts, stops and resumes it.

    python tools/submit.py --config-file dn_deformable_detr_r50_50ep.py --nodes 2 \\
        --gpus-per-node 8 --time 24:00:00 --partition gpu train.output_dir=output/run1

The same on CPUs, and on this machine without Slurm:

    python tools/submit.py --config-file ... --processes-per-node 16 --time 90 train.device=cpu
    python tools/submit.py --config-file ... --cluster local --gpus-per-node 2 --time 90

Mistakes in the overrides, the `train` section and the number of processes are found before anything
is queued. At the time limit and at a preemption the run saves, is queued again and resumes;
docs/slurm.md has the rest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dn_detr.config import resolve_config_file
from dn_detr.config.command_line import add_config_arguments, load_config
from dn_detr.engine import TrainSettings
from dn_detr.errors import UserError, user_message

SCRIPT = Path(__file__).resolve().with_name("train_net.py")
# Options that are handed to sbatch as they are.
PASSED_ON = ("partition", "account", "qos", "mem", "constraint", "comment")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code, 0 only when all went well."""
    arguments = _parser().parse_intermixed_args(argv)
    try:
        return _submit(arguments)
    except ModuleNotFoundError as error:
        if error.name != "submitit":
            raise
        return _report("submitit is not installed: pip install 'dn_detr[slurm]'")
    except UserError as error:
        return _report(user_message(error))


def _submit(arguments: argparse.Namespace) -> int:
    from dn_detr.engine.cluster import ClusterJob, Resources, parse_minutes, submit

    config_file = resolve_config_file(arguments.config_file).resolve()
    cfg = load_config(arguments)
    settings = TrainSettings.from_config(cfg)
    options = {name: getattr(arguments, name) for name in PASSED_ON}
    resources = Resources(
        minutes=parse_minutes(arguments.time),
        nodes=arguments.nodes,
        processes_per_node=arguments.gpus_per_node or arguments.processes_per_node,
        gpus_per_node=arguments.gpus_per_node,
        cpus_per_process=arguments.cpus_per_gpu,
        name=arguments.name or Path(settings.output_dir).name,
        save_before=arguments.save_before,
        max_requeues=arguments.max_requeues,
        sbatch={k: v for k, v in options.items() if v is not None} | dict(arguments.sbatch),
    )
    try:
        batch_size = OmegaConf.select(cfg, "dataloader.train.total_batch_size")
    except OmegaConfBaseException:  # it refers to what is not there: the job says so
        batch_size = None
    resources.check(settings.device, batch_size if isinstance(batch_size, int) else None)
    trust = [f"--trust={package}" for package in arguments.trust]
    command = ("--config-file", str(config_file), *trust, *arguments.overrides)
    job = ClusterJob(str(SCRIPT), command)
    folder = Path(settings.output_dir).absolute() / "slurm"
    submitted = submit(job, resources, folder, cluster=arguments.cluster)
    log = submitted.task(0).paths.stdout
    print(f"job {submitted.job_id}: {resources.num_processes} process(es), logs in {folder}")
    print(f"  follow:  tail -F {log}")
    if arguments.cluster == "slurm":
        print(f"  look:    squeue --job {submitted.job_id}")
        print(f"  cancel:  scancel {submitted.job_id}")
        return 0
    print(f"  save and end:  kill {submitted.job_id}", flush=True)
    submitted.wait()
    # The main process leaves a result only when the run is finished.
    if submitted.task(0).paths.result_pickle.exists():
        return 0
    return _report(f"the run was stopped or failed, see {log}; the same command continues it")


def _report(message: str) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description="Train on a cluster: submit a training to Slurm.",
    )
    add_config_arguments(parser)
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default: 1)")
    processes = parser.add_mutually_exclusive_group(required=True)
    processes.add_argument(
        "--gpus-per-node", type=int, default=0, metavar="N", help="GPUs, with one process each"
    )
    processes.add_argument(
        "--processes-per-node", type=int, metavar="N", help="processes, with train.device=cpu"
    )
    parser.add_argument(
        "--time", required=True, metavar="T", help="limit of one start: 90 (minutes) or 2-12:00:00"
    )
    parser.add_argument(
        "--cluster", choices=("slurm", "local"), default="slurm", help="local: here, and waits"
    )
    parser.add_argument("--cpus-per-gpu", type=int, metavar="N", help="cores of each process")
    parser.add_argument("--name", help="of the job (default: the name of train.output_dir)")
    parser.add_argument(
        "--save-before",
        type=int,
        default=120,
        metavar="S",
        help="ask the run to save S seconds before the time limit (default: %(default)s)",
    )
    parser.add_argument(
        "--max-requeues",
        type=int,
        default=100,
        metavar="N",
        help="start again at most N times after the time limit (default: %(default)s)",
    )
    for name in PASSED_ON:
        parser.add_argument(f"--{name}", help=f"as sbatch --{name}")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        type=_option,
        metavar="OPTION=VALUE",
        help="any other option of sbatch, such as reservation=cvpr; may be repeated",
    )
    return parser


def _option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: expected OPTION=VALUE")
    return name, value


if __name__ == "__main__":
    sys.exit(main())
