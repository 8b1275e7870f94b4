"""AdamW as published, for 32 images: a tenth of the rate where references and offsets are made."""

from dn_detr.configs.common.optimizer import optimizer

optimizer.lr = 2e-4
optimizer.params.lr_factors["sampling_offsets|reference_points"] = 0.1
