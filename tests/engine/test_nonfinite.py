"""What is not finite: found before it does harm, named, and survived as the settings say."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dn_detr.config import instantiate
from dn_detr.distributed import rank
from dn_detr.engine import NonFiniteError, TrainingStep, evaluate, launch, train
from dn_detr.engine.nonfinite import first_nonfinite_module
from dn_detr.engine.settings import AmpSettings, ClipGradSettings
from dn_detr.modeling import LossTerm
from tests.modeling.conftest import FAMILIES

from .faults import faulty
from .reference import assert_weights, images_of_batch, rows, train_by_hand, untimed
from .small import PLAIN, DrawnScenes, small_detector, small_run

CPU = torch.device("cpu")
DENSE, DEFORMABLE = "dn_detr_r50", "dn_deformable_detr_r50"


def bits(*states: dict[str, Any]) -> list[torch.Tensor]:
    """Copies of all tensors of some state dicts, as integers: NaN equals itself then."""
    leaves = torch.utils._pytree.tree_leaves(states)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return [tensor.detach().clone().reshape(-1).view(torch.uint8) for tensor in tensors]


def make_step(model: nn.Module, *, survive: bool = False, **amp: Any) -> TrainingStep:
    return TrainingStep(
        model.train(),
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        device=CPU,
        amp=AmpSettings(**amp),
        clip_grad=ClipGradSettings(0.1),
        survive_nonfinite=survive,
    )


def small_model(name: str, *, trainable_batch_norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    cfg = small_detector(name)
    if trainable_batch_norm:
        cfg.backbone.update(batch_norm="trainable", frozen_stages=0)
    model: nn.Module = instantiate(cfg)
    return model


@pytest.mark.parametrize(
    ("kind", "inside", "what", "where"),
    [
        ("nan_loss", "", "loss terms loss_giou_dn", "none; the losses"),
        ("inf_loss", "", "loss terms loss_giou_dn", "none; the losses"),
        ("nan_output", "transformer.encoder.layers.0.ffn.linear2", "loss terms", "{inside}\n"),
        (
            "nan_gradient",
            "transformer.encoder.layers.0.ffn.linear2",
            "the gradient",
            "{inside} (its gra",
        ),
    ],
)
def test_one_bad_image_is_named_and_changes_nothing(kind, inside, what, where):
    model = faulty(small_model(DENSE, trainable_batch_norm=True), kind, [2], inside)
    step = make_step(model)
    data = DrawnScenes()
    step([data[4], data[5]], 1)
    before = bits(model.state_dict(), step.optimizer.state_dict())
    with pytest.raises(NonFiniteError) as error:
        step([data[0], data[1], data[2]], 2)
    message = str(error.value)
    assert f"iteration 2: {what}" in message
    assert f"not finite: {where.format(inside=inside)}" in message
    assert "images/0.jpg\n" in message and "images/2.jpg\n" in message
    is_marked = "images/1.jpg  <- not finite alone either" in message
    assert is_marked == (kind != "nan_gradient")  # whose loss is finite
    after = bits(model.state_dict(), step.optimizer.state_dict())
    assert all(map(torch.equal, before, after)) and len(before) == len(after)


def test_an_image_with_nan_is_marked_and_blamed_on_the_first_layer():
    data = DrawnScenes(nan_images=(1,))
    with pytest.raises(NonFiniteError) as error:
        make_step(small_model(DEFORMABLE))([data[0], data[1]], 1)
    assert "not finite: backbone.body.conv1\n" in str(error.value)
    assert "images/1.jpg  <- not finite alone either" in str(error.value)


class Logarithm(LossTerm):
    """A term that takes the logarithm of zero."""

    def sums(self, outputs, targets, pairs):
        return (0 * pairs.predictions(outputs["pred_boxes"]).sum((1, 2))).log()


def test_a_term_of_the_loss_that_is_never_finite_is_blamed_and_neither_weights_nor_images():
    model, data = small_model(DEFORMABLE), DrawnScenes()
    model.criterion.losses["loss_mine"] = Logarithm()
    with pytest.raises(NonFiniteError) as error:
        make_step(model)([data[1], data[2]], 1)
    first, _, module, *_ = str(error.value).splitlines()
    assert first.startswith("iteration 1: loss terms loss_mine, loss_mine_0, loss_mine_dn")
    assert module.endswith("not finite: criterion.losses.loss_mine")
    assert "none of them is finite alone: the cause is named above, and no image" in str(
        error.value
    )
    assert "weights" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        (DENSE, "queries.content.weight"),
        (DENSE, "transformer.encoder.layers.0.self_attn.in_proj_weight"),
        (DEFORMABLE, "transformer.decoder.layers.1.cross_attn.value_proj.bias"),
    ],
)
def test_a_weight_that_is_nan_is_named(name, weight):
    model = small_model(name)
    with torch.no_grad():
        model.get_parameter(weight).view(-1)[0] = torch.nan
    with pytest.raises(NonFiniteError, match=f"not finite: {weight} \\(a number of the model\\)"):
        make_step(model)([DrawnScenes()[1]], 1)


SWEPT = [*FAMILIES, "dn_detr_swin_t"]


@pytest.mark.parametrize(
    "name",
    [
        n if "two_stage" in n or n.startswith("dino") else pytest.param(n, marks=pytest.mark.slow)
        for n in SWEPT
    ],
)
def test_no_module_of_a_healthy_step_is_blamed(name):
    """Padding, masks and proposals have infinities inside; none leaves a module."""
    model, data = small_model(name).train(), DrawnScenes()
    found = first_nonfinite_module(model, model, [[data[0], data[1]], [data[2]]])
    assert found == "none, when computed again"


@pytest.mark.slow
@pytest.mark.parametrize("name", [DENSE, DEFORMABLE])
def test_the_module_whose_gradient_breaks_is_named(name):
    """Every second module in turn; where nothing before it learns, its weight is what is named."""
    model, batch = small_model(name).train(), [DrawnScenes()[1]]
    wrong, planted = [], 0
    for inside, module in list(model.named_modules())[1::2]:
        if inside.startswith("backbone") or not any(True for _ in module.parameters()):
            continue
        reached = []

        def spoil(module, inputs, output, reached=reached):
            if isinstance(output, torch.Tensor) and output.requires_grad:
                reached.append(module)
                return output + (output * 0).abs().sqrt()
            return None

        handle = module.register_forward_hook(spoil)
        found = first_nonfinite_module(model, model, [batch])
        handle.remove()
        planted += bool(reached)
        if reached and found not in (f"{inside} (its gradient)", f"{inside}.weight (its gradient)"):
            wrong.append((inside, found))
    assert planted > 20 and not wrong


@pytest.mark.parametrize("dtype", ["none", pytest.param("float16", marks=pytest.mark.slow)])
def test_a_skipped_step_is_as_if_it_had_been_left_out(dtype, tmp_path):
    amp = [f"train.amp.enabled={dtype != 'none'}", "train.amp.dtype=float16"]
    bad = images_of_batch(3)[1]
    cfg = small_run(
        tmp_path, *amp, "train.nonfinite=skip", f"model.bad_images=[{bad}]", "train.max_iter=5",
        "train.ema.enabled=true",
    )  # fmt: skip
    train(cfg)
    weights, averages = train_by_hand(cfg, [1, 2, 4, 5])
    assert_weights(tmp_path / "checkpoints/last", weights)
    assert_weights(tmp_path / "checkpoints/last/ema.safetensors", averages, rounding=1e-6)
    found = [row for row in rows(tmp_path) if "loss" in row]
    assert [row["nonfinite_steps"] for row in found] == [0, 0, 1, 0, 0]
    assert [row["loss"] is None for row in found] == [False, False, True, False, False]
    assert "train.nonfinite=skip; number 1 of at most 10" in (tmp_path / "log.txt").read_text()


def test_a_nan_leaves_the_loss_scale_of_float16_alone():
    model = faulty(small_model(DENSE), "nan_loss", [2])
    step = make_step(model, survive=True, enabled=True, dtype="float16")
    data = DrawnScenes()
    step([data[0]], 1)
    before = copy.deepcopy(step.scaler.state_dict())
    step([data[1]], 2)
    assert step.scaler.state_dict() == before
    step([data[2]], 3)
    assert step.scaler.state_dict() != before


def test_overflows_of_float16_are_counted_apart(tmp_path):
    bad = images_of_batch(2)
    train(
        small_run(
            tmp_path, "model.kind=huge_loss", f"model.bad_images={bad}", "train.amp.enabled=true",
            "train.amp.dtype=float16", "train.max_iter=2",
        )
    )  # fmt: skip
    found = [row for row in rows(tmp_path) if "loss" in row]
    assert [row["overflow_steps"] for row in found][-1] == 1
    assert [row["nonfinite_steps"] for row in found] == [0, 0]


def test_the_number_of_skipped_steps_is_bounded(tmp_path):
    bad = images_of_batch(2) + images_of_batch(4)
    limited = ["train.nonfinite=skip", "train.nonfinite_limit=1", f"model.bad_images={bad}"]
    with pytest.raises(NonFiniteError, match=r"2 steps .* more than train.nonfinite_limit=1"):
        train(small_run(tmp_path, *limited))


ROLLBACK = ["train.nonfinite=rollback", "train.checkpoint.period=3", "train.max_iter=6"]


def test_a_rollback_goes_on_from_the_checkpoint_with_the_images_after_the_bad_ones(tmp_path):
    cfg = small_run(
        tmp_path, *ROLLBACK, f"model.bad_images={images_of_batch(5)}", "train.ema.enabled=true",
        "train.eval_period=3",
    )  # fmt: skip
    train(cfg)
    weights, averages = train_by_hand(cfg, [1, 2, 3, 6, 7, 8])
    assert_weights(tmp_path / "checkpoints/last", weights)
    assert_weights(tmp_path / "checkpoints/last/ema.safetensors", averages, rounding=1e-6)
    losses = [row for row in rows(tmp_path) if "loss" in row]
    assert [row["iteration"] for row in losses] == [1, 2, 3, 4, 5, 6]
    assert [row["nonfinite_steps"] for row in losses] == [0, 0, 0, 1, 0, 0]
    assert [row["iteration"] for row in rows(tmp_path) if "eval/AP" in row] == [3, 6]


def test_a_rollback_before_the_first_checkpoint_says_what_to_do(tmp_path):
    bad = f"model.bad_images={images_of_batch(2)}"
    with pytest.raises(NonFiniteError, match=r"no checkpoint to roll back to yet; lower train.ch"):
        train(small_run(tmp_path, *ROLLBACK, bad))


@pytest.mark.slow
def test_a_run_resumed_after_a_rollback_equals_one_that_was_not_interrupted(tmp_path):
    """It ends at its limit, after the rollback and before the next regular checkpoint."""
    bad = images_of_batch(5)[:1] + images_of_batch(6)[:1]
    common = [*ROLLBACK, f"model.bad_images={bad}", "train.max_iter=5"]
    train(small_run(tmp_path / "whole", *common, "train.eval_period=3"))
    with pytest.raises(NonFiniteError, match=r"more than train.nonfinite_limit=1"):
        train(
            small_run(tmp_path / "parts", *common, "train.eval_period=3", "train.nonfinite_limit=1")
        )
    train(small_run(tmp_path / "parts", *common, "train.eval_period=3"), resume=True)
    whole, parts = ([untimed(row) for row in rows(tmp_path / run)] for run in ("whole", "parts"))
    assert parts == whole and sum(row.get("nonfinite_steps", 0) for row in whole) == 2
    # the first bad images did not come again
    assert (tmp_path / "parts/log.txt").read_text().count("rolled back to") == 2
    expected, _ = train_by_hand(small_run(tmp_path / "hand", *common), [1, 2, 3, 7, 8])
    assert_weights(tmp_path / "parts", expected)


def run_on_two_processes(folder: str) -> None:
    """NaN on the process that has the bad image only; each policy."""
    bad = f"model.bad_images={images_of_batch(5)[1:2]}"  # the second process's
    common = [
        bad, *PLAIN, "train.max_iter=6", "train.checkpoint.period=3", "train.ema.enabled=true",
    ]  # fmt: skip
    for policy in ("skip", "rollback"):
        train(small_run(Path(folder, policy), *common, f"train.nonfinite={policy}", name=DENSE))
    try:
        train(small_run(Path(folder, "raise"), *common, name=DENSE))
    except NonFiniteError as error:
        Path(folder, f"{rank()}.txt").write_text(str(error))


@pytest.mark.slow
def test_two_processes_survive_what_one_of_them_sees(tmp_path):
    launch(run_on_two_processes, 2, str(tmp_path), device="cpu")
    for policy, numbers in (("skip", [1, 2, 3, 4, 6]), ("rollback", [1, 2, 3, 6, 7, 8])):
        weights, _ = train_by_hand(small_run(tmp_path, *PLAIN, name=DENSE), numbers)
        assert_weights(tmp_path / policy, weights, rounding=2e-6)
        results = rows(tmp_path / policy)[-1]
        for key, file in (("eval/AP", "model.safetensors"), ("eval/ema/AP", "ema.safetensors")):
            # each process evaluated with its own weights
            checkpoint = tmp_path / policy / "checkpoints/last" / file
            alone = small_run(tmp_path / "alone", f"train.init_checkpoint={checkpoint}", name=DENSE)
            assert evaluate(alone)["AP"] == pytest.approx(results[key], rel=1e-7)
    first, second = ((tmp_path / f"{number}.txt").read_text() for number in (0, 1))
    assert first == second
    assert "rank 0:\n" in first and first.count("<- not finite alone either") == 1
