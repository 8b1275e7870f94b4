"""How to train: everything but the model, the data and the optimizer.

`dn_detr.engine.TrainSettings` has the keys, their types, defaults and meaning. `train.output_dir`
is `output/<name of the config>` unless it is set.
"""

from omegaconf import OmegaConf

from dn_detr.engine import TrainSettings

train = OmegaConf.structured(TrainSettings)
