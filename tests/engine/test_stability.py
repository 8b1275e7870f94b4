from __future__ import annotations

import itertools
import json
import logging
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dn_detr.distributed import all_gather, barrier, is_main, rank, world_size
from dn_detr.engine import launch
from dn_detr.engine.metrics import RunningSums, merge_records
from dn_detr.engine.schedule import Timetable
from dn_detr.engine.stability import MatchingStability

# object -> query that was matched to it, -1 for none; objects that a crop removed are absent
Matching = dict[int, int]


class Measured:
    """A `MatchingStability` with the numbers since the last log record."""

    def __init__(self, num_boxes: int) -> None:
        self.stability = MatchingStability(num_boxes)
        self.sums = RunningSums()


def feed(measured: Measured, epoch: int, *images: Matching) -> None:
    """Train on a batch of an epoch."""
    found = types.SimpleNamespace(
        queries=[torch.tensor(list(image.values()), dtype=torch.int64) for image in images]
    )
    objects = [torch.tensor(list(image), dtype=torch.int64) for image in images]
    samples = [{"instances": types.SimpleNamespace(gt_ids=ids)} for ids in objects]
    state: Any = types.SimpleNamespace(
        batches_drawn=epoch + 1, timetable=Timetable(1, 10), metrics=measured.sums
    )
    result: Any = types.SimpleNamespace(diagnostics=(found,))
    measured.stability.after_step(state, samples, result)


def compare(before: Matching, now: Matching) -> tuple[float, float] | None:
    """Share of changed queries and instability of one image between two epochs."""
    measured = Measured(10)
    feed(measured, 0, before)
    feed(measured, 1, now)
    return numbers(measured)


def numbers(measured: Measured) -> tuple[float, float] | None:
    """What the next log record says."""
    record = merge_records(all_gather(measured.sums.of_this_rank(torch.device("cpu"))))
    measured.sums = RunningSums()
    if "matching/instability" not in record:
        return None
    return record.get("matching/changed", 0.0), record["matching/instability"]


def test_the_first_epoch_has_nothing_to_compare_with():
    measured = Measured(4)
    feed(measured, 0, {0: 5, 1: 6})
    assert numbers(measured) is None


def test_the_same_queries_are_no_instability():
    assert compare({0: 5, 1: 6}, {1: 6, 0: 5}) == (0, 0)


def test_two_queries_that_swap_their_objects_have_both_changed():
    assert compare({0: 5, 1: 6, 2: 7}, {0: 6, 1: 5, 2: 7}) == (2 / 3, 2)


def test_an_object_that_moves_to_a_free_query_changes_the_old_and_the_new_one():
    assert compare({0: 5, 1: 6}, {0: 9, 1: 6}) == (2 / 3, 2)


def test_a_query_that_takes_over_is_counted_once():
    assert compare({0: 5, 1: 6}, {0: 6, 1: 8}) == (3 / 3, 3)


def test_an_object_that_loses_its_query_changes_one():
    assert compare({0: 5, 1: 6}, {0: -1, 1: 6}) == (1 / 2, 1)


def test_an_object_without_a_query_in_both_epochs_counts_nowhere():
    assert compare({0: -1, 1: 6}, {0: -1, 1: 6}) == (0, 0)


def test_objects_that_a_crop_removed_do_not_count():
    assert compare({0: 5, 1: 6}, {0: 5}) == (0, 0)
    assert compare({0: 5}, {0: 5, 1: 6}) == (0, 0)
    assert compare({0: 5}, {1: 5}) is None


def test_instability_is_a_mean_over_images_and_the_share_one_over_queries():
    measured = Measured(10)
    feed(measured, 0, {0: 1, 1: 2}, {2: 1}, {})
    feed(measured, 1, {0: 2, 1: 1}, {2: 1}, {})
    assert numbers(measured) == (2 / 3, 2 / 2)


def test_every_log_record_counts_from_zero():
    measured = Measured(2)
    feed(measured, 0, {0: 1})
    feed(measured, 1, {0: 2})
    assert numbers(measured) == (1, 2)
    assert numbers(measured) is None


def test_only_the_epoch_before_is_compared():
    measured = Measured(2)
    feed(measured, 0, {0: 1})
    feed(measured, 1, {1: 1})
    feed(measured, 2, {0: 2})
    assert numbers(measured) is None
    feed(measured, 4, {0: 3})
    assert numbers(measured) is None


def test_a_state_of_other_data_is_left_aside_with_a_warning(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("dn_detr"), "propagate", True)
    measured = Measured(3)
    measured.stability.load_state_dict(MatchingStability(2).state_dict())
    assert "the checkpoint followed 2 objects, the data have 3" in caplog.text
    feed(measured, 0, {2: 1})


NUM_QUERIES, OBJECTS_PER_IMAGE = 6, 4


@st.composite
def epochs_of_images(draw) -> list[list[Matching]]:
    """Per epoch and image a matching: an object has at most one query, a query one object."""
    num_images = draw(st.integers(1, 4))
    return [
        [draw(matchings(OBJECTS_PER_IMAGE * image)) for image in range(num_images)]
        for _ in range(draw(st.integers(2, 4)))
    ]


@st.composite
def matchings(draw, first: int) -> Matching:
    objects = draw(st.sets(st.integers(first, first + OBJECTS_PER_IMAGE - 1)))
    order = draw(st.permutations(range(NUM_QUERIES)))
    return {o: draw(st.sampled_from([query, -1])) for o, query in zip(objects, order, strict=False)}


def index_vector(matching: Matching, objects: set[int]) -> list[int]:
    """The paper's V: the object of every query, -1 if it has none."""
    found = {query: o for o, query in matching.items() if o in objects and query >= 0}
    return [found.get(n, -1) for n in range(NUM_QUERIES)]


def instability(epochs: Sequence[Sequence[Matching]]) -> tuple[float, float] | None:
    """The paper's IS = sum over n of 1(V_n != previous V_n), on objects of both epochs."""
    images = changed = matched = 0
    for before, now in itertools.pairwise(epochs):
        for a, b in zip(before, now, strict=True):
            if both := a.keys() & b.keys():
                pairs = list(zip(index_vector(a, both), index_vector(b, both), strict=True))
                images += 1
                changed += sum(v != w for v, w in pairs)
                matched += sum(v >= 0 or w >= 0 for v, w in pairs)
    return (changed / matched, changed / images) if matched else None


@settings(max_examples=60, deadline=None)
@given(epochs_of_images())
def test_it_is_the_measure_of_the_paper(epochs):
    measured = Measured(OBJECTS_PER_IMAGE * len(epochs[0]))
    for epoch, images in enumerate(epochs):
        feed(measured, epoch, *images)
    expected = instability(epochs)
    found = merge_records([measured.sums.of_this_rank(torch.device("cpu"))])
    if expected is None:
        assert "matching/changed" not in found
    else:
        assert (found["matching/changed"], found["matching/instability"]) == expected


NUM_IMAGES, BATCH = 8, 4


def random_epoch(epoch: int) -> list[Matching]:
    """Every image of an epoch in shuffled order; crops remove some objects."""
    generator = torch.Generator().manual_seed(epoch)
    images = []
    for image in torch.randperm(NUM_IMAGES, generator=generator).tolist():
        queries = torch.randperm(NUM_QUERIES, generator=generator).tolist()
        kept = (torch.rand(OBJECTS_PER_IMAGE, generator=generator) < 0.8).tolist()
        first = OBJECTS_PER_IMAGE * image
        images.append({first + i: queries[i] for i in range(OBJECTS_PER_IMAGE) if kept[i]})
    return images


def run_epochs(measured: Measured, start: int, stop: int) -> None:
    """Feed batches [start, stop) of the endless training; each process takes its part."""
    per_epoch = NUM_IMAGES // BATCH
    for batch in range(start, stop):
        epoch, position = divmod(batch, per_epoch)
        images = random_epoch(epoch)[position * BATCH : (position + 1) * BATCH]
        feed(measured, epoch, *images[rank() :: world_size()])


def write_numbers(folder: str, stop: int) -> None:
    """Train to batch `stop`, from the state in the folder if there is one."""
    state_file = Path(folder, "state.pt")
    measured, start = Measured(NUM_IMAGES * OBJECTS_PER_IMAGE), 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        start = state["batches"]
        measured.stability.load_state_dict(state["stability"])
        for saved in state["sums"] if is_main() else []:
            measured.sums.add_state(saved, torch.device("cpu"))
    barrier()
    run_epochs(measured, start, stop)
    state = {
        "batches": stop,
        "stability": measured.stability.state_dict(),
        "sums": all_gather(measured.sums.state_dict()),
    }
    torch.save(state, Path(folder, f"state_of_{rank()}.pt"))
    Path(folder, f"{rank()}.json").write_text(json.dumps(numbers(measured)))
    if is_main():
        torch.save(state, state_file)
    barrier()


@pytest.mark.parametrize("interruption", range(1, 7))
def test_a_resumed_run_gives_the_numbers_of_an_uninterrupted_one(interruption, tmp_path):
    write_numbers(str(tmp_path), interruption)
    write_numbers(str(tmp_path), 7)
    uninterrupted = Measured(NUM_IMAGES * OBJECTS_PER_IMAGE)
    run_epochs(uninterrupted, 0, 7)
    assert json.loads((tmp_path / "0.json").read_text()) == list(numbers(uninterrupted) or ())


@pytest.mark.slow
def test_two_processes_give_the_numbers_and_the_state_of_one(tmp_path):
    for folder, processes in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        launch(write_numbers, processes, str(tmp_path / folder), 7, device="cpu")
    expected = json.loads((tmp_path / "one/0.json").read_text())
    assert 0 < expected[0] < 1
    for process in range(2):
        assert json.loads((tmp_path / f"two/{process}.json").read_text()) == expected
        ours = torch.load(tmp_path / f"two/state_of_{process}.pt")["stability"]
        theirs = torch.load(tmp_path / "one/state.pt")["stability"]
        assert ours.keys() == theirs.keys() and ours["epoch"] == theirs["epoch"]
        for name in ("previous", "current"):
            assert torch.equal(ours[name], theirs[name])


@pytest.mark.slow
def test_a_run_of_one_process_resumes_on_two(tmp_path):
    """The other way round follows: the state of two is that of one."""
    write_numbers(str(tmp_path), 5)
    launch(write_numbers, 2, str(tmp_path), 7, device="cpu")
    uninterrupted = Measured(NUM_IMAGES * OBJECTS_PER_IMAGE)
    run_epochs(uninterrupted, 0, 7)
    assert json.loads((tmp_path / "0.json").read_text()) == list(numbers(uninterrupted) or ())


def test_an_image_costs_less_than_a_millisecond_with_the_objects_of_coco():
    measured = Measured(860_000)
    matching = {i: i for i in range(100)}
    feed(measured, 0, matching)
    feed(measured, 1, matching)

    def cost() -> float:
        started = time.process_time()
        feed(measured, 1, matching)
        return time.process_time() - started

    assert min(cost() for _ in range(20)) < 1e-3
