"""A train loop of your own, from the parts that `dn_detr.engine.train` is made of.

    python tools/make_digits.py --root data/digits
    python examples/own_training_loop.py digits_dn_deformable_detr.py \
        dataloader.root=data/digits train.output_dir=output/own train.device=cpu train.epochs=1

It trains, saves and evaluates on one device. `train` adds what a long run needs: several ranks,
resuming, mixed precision, signals, metrics.jsonl, the best checkpoint and callbacks.
"""

from __future__ import annotations

import sys

from omegaconf import DictConfig
from torch.nn.utils import clip_grad_norm_

from dn_detr import engine
from dn_detr.checkpoint import Snapshot
from dn_detr.config import LazyConfig, get_config


def main(cfg: DictConfig) -> dict[str, float]:
    """Train what a config describes; returns the results of the last evaluation."""
    settings = engine.TrainSettings.from_config(cfg)
    device = engine.choose_device(settings.device)
    engine.seed_everything(settings.seed)
    loader, test_loader = engine.build_loaders(cfg)
    model = engine.build_model(cfg, device, loader.dataset)
    optimizer = engine.build_optimizer(cfg, model)
    timetable, lr_rule = engine.build_schedule(cfg, loader)
    evaluator = engine.build_evaluator(cfg)
    checkpoints = engine.build_checkpoint_writer(cfg, loader.dataset)
    results = {}
    model.train()
    for iteration, samples in zip(range(1, timetable.max_iter + 1), loader, strict=False):
        factor = lr_rule(timetable.epoch(iteration - 1), timetable.total_epochs)
        engine.set_learning_rates(optimizer, factor)
        losses = model(samples)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), settings.clip_grad.max_norm)
        optimizer.step()
        if timetable.is_due(settings.log_period, iteration):
            print(f"iteration {iteration}/{timetable.max_iter}: loss {loss:.3f}")
        if timetable.is_due(settings.checkpoint.period, iteration):
            checkpoints.save(Snapshot(iteration, timetable.epoch(iteration), model.state_dict()))
        if timetable.is_due(settings.eval_period, iteration):
            results = engine.evaluate_model(model, test_loader, evaluator)
            print(f"iteration {iteration}: AP {results['AP']:.3f}")
    checkpoints.close()
    return results


if __name__ == "__main__":
    main(LazyConfig.apply_overrides(get_config(sys.argv[1]), sys.argv[2:]))
