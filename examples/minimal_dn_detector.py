"""A detector in fewer than 100 lines that learns with denoising.

    python examples/minimal_dn_detector.py

It finds coloured squares, in plain torch but for the denoising (calls 1, 2, 3) and the set loss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dn_detr.modeling import BoxQueryEmbedding, DetectionCriterion, QueryDenoising

DIM, HEADS, CLASSES, QUERIES, LAYERS = 64, 4, 3, 10, 2


class MinimalDetector(nn.Module):
    """A convolution stem and torch's own transformer decoder, with boxes as queries."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = nn.Conv2d(3, DIM, 5, 4, padding=2), nn.Conv2d(DIM, DIM, 3, 2, padding=1)
        self.stem = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1])
        self.cell_pos = nn.Parameter(torch.randn(64, DIM))  # 8x8 cells
        self.content = nn.Embedding(QUERIES, DIM)
        self.anchors = nn.Embedding(QUERIES, 4)
        self.box_pos = nn.Sequential(nn.Linear(4, DIM), nn.ReLU(), nn.Linear(DIM, DIM))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(DIM, HEADS, 2 * DIM, dropout=0.0, batch_first=True)
            for _ in range(LAYERS)
        )
        self.class_head = nn.Linear(DIM, CLASSES)
        self.box_head = nn.Linear(DIM, 4)
        self.criterion = DetectionCriterion()
        self.denoising = QueryDenoising(CLASSES, BoxQueryEmbedding(CLASSES, DIM, indicator=False))

    def decode(
        self, images: Tensor, content: Tensor, anchors: Tensor, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Logits (N, B, Q, K) and boxes (N, B, Q, 4) of all layers."""
        memory = self.stem(images).flatten(2).transpose(1, 2) + self.cell_pos
        if mask is not None:
            mask = mask.repeat_interleave(HEADS, dim=0)  # what nn.MultiheadAttention wants
        logits, boxes = [], []
        for layer in self.layers:
            content = layer(content + self.box_pos(anchors.sigmoid()), memory, tgt_mask=mask)
            anchors = self.box_head(content) + anchors
            logits.append(self.class_head(content))
            boxes.append(anchors.sigmoid())
            anchors = anchors.detach()
        return {"pred_logits": torch.stack(logits), "pred_boxes": torch.stack(boxes)}

    def forward(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        content = self.content.weight.expand(len(images), -1, -1)
        anchors = self.anchors.weight.expand(len(images), -1, -1)
        noised = self.denoising(targets, content, anchors)  # 1
        outputs = self.decode(images, noised.content, noised.position, noised.attention_mask)
        denoised, matching = noised.split(outputs)  # 2
        pairs = self.criterion.matcher(matching, targets)
        losses = self.criterion(matching, targets, pairs, count=len(pairs))  # 3, twice
        pairs = noised.pairs
        return losses | self.criterion(denoised, targets, pairs, count=len(pairs), suffix="_dn")


def draw_batch(size: int = 16) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Images of 64x64 with one to three squares; the colour is the class."""
    images, targets = torch.zeros(size, 3, 64, 64), []
    for image in images:
        count = int(torch.randint(1, 4, ()))
        labels = torch.randint(CLASSES, (count,))
        corners, sides = torch.randint(0, 40, (count, 2)), torch.randint(10, 24, (count, 1))
        for label, (x, y), side in zip(labels, corners.tolist(), sides[:, 0], strict=True):
            image[label, y : y + int(side), x : x + int(side)] = 1.0
        boxes = torch.cat([corners + sides / 2, sides.expand(-1, 2)], dim=-1) / 64
        targets.append({"labels": labels, "boxes": boxes})
    return images, targets


def main(steps: int = 100) -> list[float]:
    """Train and return the total loss of each step."""
    torch.manual_seed(0)
    model = MinimalDetector()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    for step in range(steps):
        losses = model(*draw_batch())
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(total.item())
        if step % 10 == 0:
            print(f"step {step}: loss {history[-1]:.3f}, denoising {losses['loss_bbox_dn']:.3f}")
    return history


if __name__ == "__main__":
    main()
