"""What is remembered of an index tensor: the same numbers cost nothing, others are never taken for them."""

import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attn_core import block_attention, group_attention, window_index
from attn_core.kernels.derived import _known, derived


def counted() -> tuple[list[Any], Any]:
    calls: list[Any] = []

    def total(*indices: Tensor | None) -> list[int]:
        calls.append(indices)
        return [int(index.sum()) for index in indices if index is not None]

    return calls, total


def test_the_same_numbers_are_read_once() -> None:
    calls, total = counted()
    index, other = torch.arange(5), torch.arange(3)
    assert [derived("sum", total, index, None, other) for _ in range(3)] == [[10, 3]] * 3
    assert len(calls) == 1


def test_key_and_partners_are_told_apart() -> None:
    calls, total = counted()
    index = torch.arange(5)
    for key, other in (("a", None), ("b", None), ("a", torch.arange(3)), ("a", torch.arange(4))):
        expected = [10] if other is None else [10, int(other.sum())]
        assert derived(key, total, index, other) == expected
    assert len(calls) == 4


def by_item(index: Tensor, _shared: Any) -> None:
    index[0] = 7


def without_a_count(index: Tensor, _shared: Any) -> None:
    index.data[0] = 7  # the version of ``index`` stays


def through_numpy(_index: Tensor, shared: Any) -> None:
    shared[0] = 7


@pytest.mark.parametrize("change", [by_item, without_a_count, through_numpy])
def test_a_change_in_place_is_seen(change: Any) -> None:
    _, total = counted()
    shared = np.arange(5)
    index = torch.from_numpy(shared)
    before = derived("sum", total, index)
    change(index, shared)
    assert (before, derived("sum", total, index)) == ([10], [17])


def test_a_change_of_a_partner_is_seen() -> None:
    _, total = counted()
    index, other = torch.arange(5), torch.arange(3)
    derived("sum", total, index, other)
    other += 1
    assert derived("sum", total, index, other) == [10, 6]


def test_nothing_outlives_its_tensor() -> None:
    index, other = torch.arange(1000), torch.arange(1000)
    result = derived("copy", lambda *x: [part.view(-1) for part in x], index, other)
    # A result may hold what it was built of, and that is no part of the tensor.
    assert result[0].data_ptr() != index.data_ptr()
    seen, places = [weakref.ref(index), weakref.ref(other)], [id(index), id(other)]
    del result, index, other
    gc.collect()
    assert [ref() for ref in seen] == [None, None]
    assert not any(place in _known for place in places)


def test_another_tensor_in_the_same_place_is_another() -> None:
    _, total = counted()
    for start in range(50):  # Python uses the freed place again
        assert derived("sum", total, torch.arange(start, start + 2)) == [2 * start + 1]


def test_traces_and_transforms_keep_nothing() -> None:
    index = torch.arange(6).view(2, 3)
    before = len(_known)
    torch.func.vmap(lambda x: derived("double", lambda y: y * 2, x))(index)
    assert len(_known) == before


def test_threads_get_the_answer_of_their_own_numbers() -> None:
    wrong = []

    def work(offset: int) -> None:
        index = torch.arange(4)
        for step in range(300):
            index.copy_(torch.arange(4) + offset + step)
            if derived("sum", lambda x: int(x.sum()), index) != 6 + 4 * (offset + step):
                wrong.append((offset, step))

    threads = [threading.Thread(target=work, args=(1000 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def grouped(group: Tensor, mask: Tensor, backend: Any) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 9, 8, requires_grad=True) for _ in range(3))
    out, lse = group_attention(q, k, v, group, 3, key_mask=mask, backend=backend)
    return out, lse, *torch.autograd.grad(out.square().sum() + lse[..., :1].sum(), (q, k, v))


def blocked(index: Tensor, table: Tensor, backend: Any) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 16, 8, requires_grad=True) for _ in range(3))
    out, lse = block_attention(q, k, v, index, index, table, backend=backend)
    return out, lse, *torch.autograd.grad(out.square().sum(), (q, k, v))


def assert_equal_to_reference(function: Any, *indices: Tensor) -> None:
    for actual, expected in zip(function(*indices, None), function(*indices, "reference"), strict=True):
        torch.testing.assert_close(actual, expected)


def test_group_attention_follows_groups_and_masks_changed_in_place() -> None:
    group, mask = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1, 2]]), torch.ones(2, 9, dtype=torch.bool)
    for change in (
        lambda: None,
        lambda: group.data.add_(1).remainder_(3),
        lambda: mask[1].logical_not_(),
        lambda: None,
    ):
        change()
        for _ in range(2):
            assert_equal_to_reference(grouped, group, mask)


@pytest.mark.parametrize("heads", [1, 2])
def test_block_attention_follows_lists_and_tables_changed_in_place(heads: int) -> None:
    index, table = window_index(4, 4, (2, 2)), torch.tensor([0, 1, 1, 2, 2, 3, 3, 0]).view(1, 1, 4, 2)
    table = table.expand(1, heads, 4, 2).contiguous()
    for change in (lambda: None, lambda: table[..., 1].fill_(-1), lambda: index.copy_(index.flip(2)), lambda: None):
        change()
        for _ in range(2):
            assert_equal_to_reference(blocked, index, table)


def test_errors_are_raised_each_time() -> None:
    q = torch.randn(1, 1, 16, 8)
    index = window_index(4, 4, (2, 2))
    index[0, 0, 0, 0] = 99
    for _ in range(2):
        with pytest.raises(ValueError, match=r"block_attention: q_index must hold −1 \(a hole\) or 0…15"):
            block_attention(q, q, q, index, index)
    index[0, 0, 0, 0] = 0
    block_attention(q, q, q, index, index)
