"""Deformable DETR: plain, with box refinement, and two-stage."""
