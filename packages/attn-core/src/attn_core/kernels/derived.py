"""What is computed from the numbers of an index tensor, kept for as long as the tensor lives and holds them.

Block lists and groups of keys seldom change between calls, and what follows from them (sortings, masks, whether there
are holes) costs a small call many times its arithmetic. A result belongs to a tensor *object*, and is taken again only
after its numbers were compared with a copy: a change in place, through a view, ``.data`` or a shared NumPy array is
seen. Nothing here keeps the tensor alive.
"""

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from attn_core import torch_internals

T = TypeVar("T")

# Results that one index remembers (heads, sizes and partners differ); more begin again.
MAX_RESULTS = 16


class _Known:
    """An index that was met before: a copy of its numbers, and what was derived from them."""

    __slots__ = ("numbers", "results", "tensor")

    def __init__(self, tensor: "weakref.ref[Tensor]", numbers: Tensor) -> None:
        self.tensor = tensor
        self.numbers = numbers
        self.results: dict[Any, Any] = {}


_known: dict[int, _Known] = {}


def derived(key: Hashable, build: Callable[..., T], first: Tensor, *others: Tensor | None) -> T:
    """``build(first, *others)``, or what it returned for the same numbers and ``key``.

    Kept for tensors on a CPU, outside of traces and transforms; ``build`` then gets copies, which its result may hold.

    Args:
        key: everything else that the result depends on.
        build: called with the indices, or copies of them; its result is shared, and must not be changed.
    """
    if not _keeps(first, *others):
        return build(first, *others)
    known = _meet(first)
    beside = [None if index is None else known if index is first else _meet(index) for index in others]
    place = (key, *beside)
    try:
        return known.results[place]
    except KeyError:
        pass
    result = build(known.numbers, *(None if own is None else own.numbers for own in beside))
    if len(known.results) >= MAX_RESULTS:
        known.results.clear()
    known.results[place] = result
    return result


def _keeps(*indices: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or torch_internals.is_transformed():
        return False
    return all(index is None or (type(index) is Tensor and index.is_cpu) for index in indices)


def _meet(index: Tensor) -> _Known:
    place = id(index)
    known = _known.get(place)
    if known is not None and known.tensor() is index:
        numbers = known.numbers
        if numbers.dtype == index.dtype and torch.equal(numbers, index):
            return known
        tensor = known.tensor
    else:

        def forget(tensor: "weakref.ref[Tensor]", place: int = place, every: dict[int, _Known] = _known) -> None:
            own = every.get(place)
            if own is not None and own.tensor is tensor:
                del every[place]
                own.results.clear()

        tensor = weakref.ref(index, forget)
    # A new entry even where only the numbers changed: another thread may still be reading the old one.
    known = _known[place] = _Known(tensor, index.detach().clone(memory_format=torch.contiguous_format))
    return known
