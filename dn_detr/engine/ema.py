"""The exponential moving average of a model's weights."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def averaged_model(model: nn.Module, decay: float) -> AveragedModel:
    """Return a copy of a model that follows its weights and running statistics.

    Call `update_parameters(model)` after every optimizer step: the first call copies, each later
    one moves every weight by 1 - decay of its distance. `.module` is the averaged model.

    Args:
        model: not wrapped by DistributedDataParallel; all processes have the same average then.
        decay: in (0, 1); 0.9997 averages over about 3300 steps.
    """
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    averaged.requires_grad_(False)
    return averaged
