"""The exponential moving average of a model's weights."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def averaged_model(model: nn.Module, decay: float) -> AveragedModel:
    """Return a copy of a model that follows its weights and running statistics.

    Call `update_parameters(model)` after every optimizer step: it moves every weight by 1 - decay
    of its distance. `.module` is the averaged model, which is all that a checkpoint needs to keep.

    Args:
        model: not wrapped by DistributedDataParallel; all processes have the same average then.
        decay: in (0, 1); 0.9997 averages over about 3300 steps.
    """
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    averaged.requires_grad_(False)
    averaged.n_averaged.fill_(1)  # the weights to start from count; 0 would make them forgotten
    return averaged
