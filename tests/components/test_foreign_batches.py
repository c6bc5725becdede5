"""Batches of containers that nobody here made: moved, counted, cut, mapped."""

from __future__ import annotations

from collections import OrderedDict, UserDict, deque, namedtuple
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from transformers import BatchEncoding

from danling_conf.components.batch import count_samples, map_tensors, rows, tensors, to_device
from danling_conf.topology.violation import SettingError

META = torch.device("meta")
SIZE = 4
Record = namedtuple("Record", ["name", "x"])


@dataclass(frozen=True)
class Frozen:
    name: list[str]
    x: Tensor
    made: int = field(init=False, default=3)


@dataclass(slots=True)
class Slots:
    x: Tensor


class ReadOnly(Mapping[str, Any]):
    def __init__(self, items: dict[str, Any]) -> None:
        self.items_ = items

    def __getitem__(self, key: str) -> Any:
        return self.items_[key]

    def __iter__(self) -> Any:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)


class Named(list[Any]):
    """A list of a class of its own."""


class Moves:
    """Moves by its own method, and hides its tensors."""

    def __init__(self, x: Tensor) -> None:
        self.hidden = x

    def to(self, device: torch.device) -> Moves:
        return Moves(self.hidden.to(device))


def x() -> Tensor:
    return torch.arange(SIZE * 3.0).reshape(SIZE, 3)


NAMES = [f"sample-{number}" for number in range(SIZE)]
CONTAINERS = {
    "pair": lambda: [x(), x()],
    "tuple with strings": lambda: (NAMES, torch.tensor(2.0), x()),
    "dict, strings first": lambda: {"id": NAMES, "scale": torch.tensor(0.5), "x": x()},
    "nested": lambda: {"meta": {"id": NAMES, "lengths": [1, 2, 3, 4]}, "views": [x(), (x(), None)]},
    "ordered": lambda: OrderedDict(id=NAMES, x=x()),
    "read-only": lambda: MappingProxyType({"x": x()}),
    "a mapping": lambda: ReadOnly({"id": NAMES, "x": x()}),
    "UserDict": lambda: UserDict(id=NAMES, x=x()),
    "BatchEncoding": lambda: BatchEncoding({"text": NAMES, "input_ids": x()}),
    "named tuple": lambda: Record(NAMES, x()),
    "dataclass": lambda: Frozen(NAMES, x()),
    "dataclass with slots": lambda: Slots(x()),
    "a list class": lambda: Named([NAMES, x()]),
    "deque": lambda: deque([x()]),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_is_moved_counted_and_cut(name: str) -> None:
    batch = CONTAINERS[name]()
    assert count_samples(batch) == SIZE
    moved = to_device(batch, META)
    assert type(moved) is type(batch)
    assert {tensor.device.type for tensor in tensors(moved)} == {"meta"}
    assert {tensor.device.type for tensor in tensors(batch)} == {"cpu"}  # the batch itself stays
    assert len(list(tensors(moved))) == len(list(tensors(batch)))
    half = rows(batch, slice(2, 4), SIZE)
    assert type(half) is type(batch)
    assert count_samples(half) == 2
    for whole, part in zip(tensors(batch), tensors(half), strict=True):
        assert torch.equal(part, whole[2:4] if whole.ndim else whole)
    doubled = map_tensors(lambda tensor: tensor * 2, batch)
    for once, twice in zip(tensors(batch), tensors(doubled), strict=True):
        assert torch.equal(twice, once * 2)


def test_lists_of_one_item_a_sample_are_cut_with_the_tensors() -> None:
    images = [torch.zeros(3, number + 5) for number in range(SIZE)]
    batch = {"x": x(), "id": NAMES, "length": (1, 2, 3, 4), "images": images, "classes": ["a", "b"], "n": torch.ones(7)}
    half = rows(batch, slice(0, 2), SIZE)
    assert (half["id"], half["length"], half["classes"]) == (NAMES[:2], (1, 2), ["a", "b"])
    assert [image.shape[1] for image in half["images"]] == [5, 6]
    assert half["n"].shape == (7,)
    pair = rows([torch.zeros(2, 1), torch.ones(2, 1)], slice(1, 2), 2)  # two tensors, and two samples
    assert [tuple(item.shape) for item in pair] == [(1, 1), (1, 1)]


def test_what_has_no_tensor_is_counted_by_its_first_list_of_values() -> None:
    assert count_samples({"scale": torch.tensor(1.0), "text": NAMES}) == SIZE
    assert count_samples([torch.tensor(1.0)] * 3) == 3
    for batch in (Moves(x()), {"a": torch.tensor(1.0)}, "text", 3, None):
        with pytest.raises(SettingError, match="pass count_samples="):
            count_samples(batch)


def test_an_object_moves_by_its_own_method_and_is_not_cut() -> None:
    batch = {"graph": Moves(x()), "y": x()}
    moved = to_device(batch, META)
    assert moved["graph"].hidden.device.type == moved["y"].device.type == "meta"
    with pytest.raises(SettingError, match=r"a batch with a Moves in it cannot be cut into microbatches"):
        rows(batch, slice(0, 2), SIZE)
    # One of its tensors stays on the CPU whatever moves.
    assert to_device([pack_sequence([torch.ones(2), torch.ones(1)])], torch.device("cpu"))[0].batch_sizes.tolist() == [
        2,
        1,
    ]


def test_a_container_that_cannot_be_made_anew_is_refused() -> None:
    class Odd(tuple[Any, ...]):
        def __new__(cls, *items: Any) -> Any:
            return super().__new__(cls, items)

        def __init__(self, first: Any, second: Any) -> None: ...

    with pytest.raises(SettingError, match="a Odd in a batch cannot be made anew"):
        to_device(Odd(x(), x()), META)
