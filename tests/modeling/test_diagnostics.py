"""What a training step reports beside its losses."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from .conftest import make_sample


def _samples(objects: list[int]) -> list[dict]:
    return [make_sample(64, 80, count, seed) for seed, count in enumerate(objects)]


def test_queries_are_those_that_the_matcher_gives_each_object(small):
    samples = _samples([2, 0, 3])
    small(samples)
    queries = small.diagnostics.queries
    images, mask = small.preprocess(samples)
    small.denoising = None
    memory = small.encode(images, mask)
    own = small.queries(memory)
    outputs = small.decode(memory, own.content, own.position)
    cost = small.criterion.matcher.cost(outputs, small.prepare_targets(samples))[-1]
    for image, (found, count) in enumerate(zip(queries, [2, 0, 3], strict=True)):
        assert found.dtype == torch.int64 and found.device.type == "cpu"
        chosen, objects = linear_sum_assignment(cost[image, :, :count])
        assert found.tolist() == [chosen[list(objects).index(n)] for n in range(count)]


def test_an_object_without_a_query_has_number_minus_one(small):
    count = small.num_queries + 3
    small(_samples([count]))
    (found,) = small.diagnostics.queries
    assert len(found) == count and (found == -1).sum() == 3
    assert sorted(found[found >= 0].tolist()) == list(range(small.num_queries))


def test_noised_boxes_of_the_right_class_are_counted(small):
    samples = _samples([2, 3])
    label = samples[0]["instances"].gt_classes[0]
    with torch.no_grad():
        for head in small.heads.class_embed:
            head.weight.zero_()
            head.bias.copy_(torch.arange(10) == label)
    small(samples)
    found = sum((sample["instances"].gt_classes == label).sum().item() for sample in samples)
    assert small.diagnostics.denoising_correct == 5 * found > 0


@pytest.mark.parametrize("objects", [[2, 3], [0, 0]])
def test_denoising_is_counted_without_a_gradient(objects, small):
    small(_samples(objects))
    found = small.diagnostics
    assert found.denoising_total == 5 * sum(objects)
    assert 0 <= found.denoising_correct <= found.denoising_total
    assert found.denoising_correct.shape == () and not found.denoising_correct.requires_grad


def test_without_denoising_nothing_is_denoised(small):
    small.denoising = None
    small(_samples([2]))
    assert (int(small.diagnostics.denoising_correct), small.diagnostics.denoising_total) == (0, 0)


def test_diagnostics_are_not_part_of_the_model(small):
    assert small.diagnostics is None
    names = list(small.state_dict())
    small(_samples([2]))
    assert list(small.state_dict()) == names
    copied = copy.deepcopy(small)
    assert torch.equal(copied.diagnostics.queries[0], small.diagnostics.queries[0])


def test_evaluation_leaves_the_diagnostics_alone(small):
    small(_samples([2]))
    before = small.diagnostics
    small.eval()
    small(_samples([3]))
    assert small.diagnostics is before
