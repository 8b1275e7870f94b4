"""What a lazy call records."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from torch import nn

from dn_detr.config import LazyCall as L
from dn_detr.config import instantiate


def test_callable_is_stored_by_its_importable_name() -> None:
    node = L(nn.Linear)(in_features=2, out_features=3)
    assert node == {
        "_target_": "torch.nn.modules.linear.Linear",
        "in_features": 2,
        "out_features": 3,
    }


def test_inherited_class_method_keeps_its_own_class() -> None:
    class_method = nn.EmbeddingBag.from_pretrained
    assert L(class_method)()._target_ == "torch.nn.modules.sparse.EmbeddingBag.from_pretrained"


def test_local_function_is_stored_as_an_object() -> None:
    def local() -> int:
        return 7

    node = L(local)()
    assert node._target_ is local
    assert instantiate(node) == 7


def test_name_is_stored_without_importing_it() -> None:
    assert L("no_such_package.Thing")()._target_ == "no_such_package.Thing"


@pytest.mark.parametrize("target", [3, None, {"a": 1}])
def test_target_that_is_not_callable_is_refused(target: Any) -> None:
    with pytest.raises(TypeError, match="needs a callable or its dotted name"):
        L(target)


def test_positional_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match=r"Linear\) takes keyword arguments only.*2 by position"):
        L(nn.Linear)(4, 5)


def test_nodes_are_edited_by_attribute() -> None:
    node = L(nn.Sequential)(inner=L(nn.Linear)(in_features=1, out_features=1))
    node.inner.out_features = 9
    node.extra = "${.inner.out_features}"
    assert node.extra == 9


def test_any_object_can_be_an_argument() -> None:
    @dataclasses.dataclass
    class Size:
        width: int

    size = Size(3)
    assert instantiate(L(dict)(size=size, kind=Size)) == {"size": size, "kind": Size}
