"""Deformable DETR with ResNet-50 and iterative bounding box refinement (appendix A.4)."""

from .deformable_detr_r50 import model

model.transformer.decoder.refine = True
model.heads.shared = False  # a class head and a box head of every layer
