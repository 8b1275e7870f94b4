"""DINO: contrastive denoising, mixed query selection and look-forward-twice on DN-DETR."""
