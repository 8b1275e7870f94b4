"""`Boxes` and `Instances`: detectron2's protocol without detectron2.

Detectron2's own classes are accepted wherever these are, and its evaluators read these.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .boxes import box_area


class Boxes:
    """N boxes as corners in absolute pixels.

    Args:
        tensor: (N, 4) XYXY; converted to float32. An empty list gives N = 0.

    Raises:
        ValueError: the shape is not (N, 4).
    """

    def __init__(self, tensor: Tensor | list[list[float]]) -> None:
        boxes_xyxy = torch.as_tensor(tensor, dtype=torch.float32)
        if boxes_xyxy.numel() == 0:
            boxes_xyxy = boxes_xyxy.reshape(0, 4)
        if boxes_xyxy.ndim != 2 or boxes_xyxy.shape[1] != 4:
            raise ValueError(f"boxes must have shape (N, 4), got {tuple(boxes_xyxy.shape)}")
        self.tensor = boxes_xyxy

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def area(self) -> Tensor:
        """(N,) areas in square pixels."""
        return box_area(self.tensor)

    def clone(self) -> Boxes:
        return Boxes(self.tensor.clone())

    def to(self, device: torch.device | str) -> Boxes:
        return Boxes(self.tensor.to(device))

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __getitem__(self, item: int | slice | Tensor) -> Boxes:
        """The chosen boxes; a single index keeps the row dimension."""
        return Boxes(self.tensor[item].reshape(-1, 4))

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensor)

    def __repr__(self) -> str:
        return f"Boxes({self.tensor})"


class Instances:
    """Objects of one image: named fields of equal length.

    Args:
        image_size: (height, width) in pixels of the image that the boxes refer to.
        **fields: tensors, `Boxes` or anything with `len` and indexing.

    Raises:
        ValueError: a field's length differs from the others'.
    """

    image_size: tuple[int, int]

    def __init__(self, image_size: tuple[int, int], **fields: Any) -> None:
        object.__setattr__(self, "image_size", tuple(image_size))
        object.__setattr__(self, "_fields", {})
        for name, value in fields.items():
            self.set(name, value)

    def set(self, name: str, value: Any) -> None:
        others = [field for key, field in self._fields.items() if key != name]
        if others and len(value) != len(others[0]):
            raise ValueError(f"field {name!r} has length {len(value)}, not {len(others[0])}")
        self._fields[name] = value

    def get(self, name: str) -> Any:
        return self._fields[name]

    def has(self, name: str) -> bool:
        return name in self._fields

    def remove(self, name: str) -> None:
        del self._fields[name]

    def get_fields(self) -> dict[str, Any]:
        return self._fields

    def __setattr__(self, name: str, value: Any) -> None:
        self.set(name, value)

    def __getattr__(self, name: str) -> Any:
        fields = self.__dict__.get("_fields", {})
        if name not in fields:
            raise AttributeError(f"these instances have no field {name!r}, only {sorted(fields)}")
        return fields[name]

    def to(self, device: torch.device | str) -> Instances:
        moved = {
            name: value.to(device) if hasattr(value, "to") else value
            for name, value in self._fields.items()
        }
        return Instances(self.image_size, **moved)

    def __len__(self) -> int:
        for value in self._fields.values():
            return len(value)
        raise ValueError("instances without fields have no length")

    def __getitem__(self, item: int | slice | Tensor) -> Instances:
        """The chosen objects; a single index keeps the row dimension."""
        if isinstance(item, int):
            if not -len(self) <= item < len(self):
                raise IndexError(f"instance {item} of {len(self)}")
            item = slice(item, item + 1 or None)

        def chosen(field: Any) -> Any:
            if isinstance(field, np.ndarray) and isinstance(item, Tensor):
                return field[item.numpy(force=True)]  # it takes a single element for an integer
            return field[item]

        return Instances(self.image_size, **{k: chosen(v) for k, v in self._fields.items()})

    def __repr__(self) -> str:
        return f"Instances(image_size={self.image_size}, fields={self._fields})"
