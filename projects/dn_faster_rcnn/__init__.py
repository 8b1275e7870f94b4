"""torchvision's Faster R-CNN, and box denoising in its box head."""
