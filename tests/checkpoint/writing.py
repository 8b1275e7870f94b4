"""What the tests of writing share: states that say which iteration they are of, real processes."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dn_detr.checkpoint import (
    CheckpointWriter,
    Snapshot,
    last_checkpoint,
    load_checkpoint,
    read_manifest,
)

# Children are forked from a server that has imported the library and has no threads.
PROCESSES = multiprocessing.get_context("forkserver")


def snapshot(iteration: int, size: int = 1000) -> Snapshot:
    """A state whose every number is the iteration."""
    value = float(iteration)
    names = ("a.weight", "b.weight", "c.bias")
    shapes = ((size,), (size // 2, 2), (3,))
    weights = {name: torch.full(shape, value) for name, shape in zip(names, shapes, strict=True)}
    moments = {
        index: {"step": torch.tensor(value), "exp_avg": torch.full(shape, value)}
        for index, shape in enumerate(shapes)
    }
    return Snapshot(
        iteration,
        epoch=value / 10,
        model=weights,
        optimizer={"state": moments, "param_groups": [{"lr": 0.1, "params": [0, 1, 2]}]},
        training_state={"scaler": {}, "processes": [{"random": (3, (iteration, 5), None)}]},
        ema={name: weight + 0.5 for name, weight in weights.items()},
    )


def save(output_dir: Path, snapshot: Snapshot, **settings: Any) -> Path:
    """Write one checkpoint of a run and return its folder."""
    with CheckpointWriter(output_dir, asynchronous=False, **settings) as writer:
        writer.save(snapshot)
        writer.wait()
    assert writer.latest is not None
    return writer.latest


def assert_holds(folder: Path, expected: Snapshot) -> None:
    """Every number of the checkpoint is that of the snapshot."""
    assert_equal(vars(load_checkpoint(folder).snapshot), vars(expected))


def assert_equal(found: Any, expected: Any) -> None:
    """Compare nested states to the last bit."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal(found[key], value)
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_equal(a, b)
    else:
        assert found == expected


def run_processes(count: int, target: Callable[..., None], *arguments: Any) -> list[Any]:
    """Run `target(rank, send, barrier, *arguments)` in processes and return what each sent."""
    barrier = PROCESSES.Barrier(count)
    pipes = [PROCESSES.Pipe(duplex=False) for _ in range(count)]
    processes = [
        PROCESSES.Process(target=target, args=(rank, send.send, barrier, *arguments))
        for rank, (_, send) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, send in pipes:
        send.close()
    answers = []
    for receive, _ in pipes:
        try:
            answers.append(receive.recv() if receive.poll(60) else None)
        except EOFError:
            answers.append(None)
    for process in processes:
        process.join(60)
        assert process.exitcode is not None
    return answers


def save_until_killed(send: Any, folder: Path, size: int) -> None:
    """Save one checkpoint after another, now and then the best so far."""
    last = last_checkpoint(folder)
    iteration = read_manifest(last).iteration if last else 0
    with CheckpointWriter(folder, keep=2) as writer:
        send("started")
        while True:
            iteration += 1
            writer.save(snapshot(iteration, size))
            writer.record_evaluation(iteration, {"AP": iteration}, is_best=iteration % 3 == 0)
            if failures := writer.failures():
                raise failures[0]


def fill_the_disk(rank: int, send: Any, barrier: Any, folder: Path, asynchronous: bool) -> None:
    """Save one checkpoint, one with a limit on the size of files, and one without it again."""
    with CheckpointWriter(folder, asynchronous=asynchronous) as writer:
        writer.save(snapshot(1))
        writer.wait()
        limit_file_size(2000)
        writer.save(snapshot(2))
        try:
            writer.wait()
        except ValueError as error:
            message = str(error)
        names = sorted(path.name for path in (folder / "checkpoints").iterdir())
        last = last_checkpoint(folder).name
        limit_file_size(None)
        writer.save(snapshot(3))
        writer.wait()
        send((message, names, last, writer.latest.name))


def limit_file_size(size: int | None) -> None:
    """Let writing more than that many bytes to a file fail as on a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))
