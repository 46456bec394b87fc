"""flash_attn, swattention, spatial_correlation_sampler: values, raw backward, refusals by name."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_core.compat import Provided, provide

Shim = Callable[..., Provided]


def close(actual: Tensor, expected: Tensor, bound: float = 1e-10) -> bool:
    return actual.shape == expected.shape and float((actual.detach() - expected.detach()).abs().max()) <= bound


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """(S, H, D), causality aligned at the lower right."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1]) if causal else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_with_grouped_heads_and_packed_tensors(causal: bool) -> None:
    with provide("flash_attn"):
        flash = importlib.import_module("flash_attn")
    q = torch.randn(2, 5, 4, 8, dtype=torch.float64)
    k, v = (torch.randn(2, 7, 2, 8, dtype=torch.float64) for _ in range(2))
    expected = torch.stack([plain(*row, causal) for row in zip(q, k, v, strict=True)])
    assert close(flash.flash_attn_func(q, k, v, causal=causal), expected)
    assert close(flash.flash_attn_kvpacked_func(q, torch.stack([k, v], 2), causal=causal), expected)
    out, lse, probs = flash.flash_attn_func(q, k, v, 0.0, None, causal, return_attn_probs=True)
    assert close(out, expected)
    assert (lse.shape, probs) == ((2, 4, 5), None)
    packed = torch.stack([q, q, q], 2)
    same = torch.stack([plain(row, row, row, causal) for row in q])
    assert close(flash.flash_attn_qkvpacked_func(packed, causal=causal), same)


def test_sequences_behind_each_other_do_not_see_each_other() -> None:
    with provide("flash_attn"):
        flash = importlib.import_module("flash_attn.flash_attn_interface")
    qkv = torch.randn(9, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    starts = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    expected = torch.cat([plain(qkv[a:b, 0], qkv[a:b, 1], qkv[a:b, 2], True) for a, b in ((0, 4), (4, 9))])
    out = flash.flash_attn_varlen_qkvpacked_func(qkv, starts, 5, causal=True)
    old = flash.flash_attn_unpadded_qkvpacked_func(qkv, starts, 5, 0.0, softmax_scale=None, causal=True)
    q, k, v = qkv.unbind(1)
    split = flash.flash_attn_varlen_func(q, k, v, starts, starts, 5, 5, causal=True)
    for actual in (out, old, split):
        assert close(actual, expected)
    grad = torch.randn_like(out)
    ours, wanted = (torch.autograd.grad(x, qkv, grad)[0] for x in (out, expected))
    assert close(ours, wanted)


@pytest.mark.parametrize("window", [(2, 1), (3, -1), (-1, 0), (None, 2)])
def test_a_window_is_counted_from_the_lower_right_in_rows_and_in_packed_sequences(window: tuple[Any, int]) -> None:
    with provide("flash_attn"):
        flash = importlib.import_module("flash_attn")
    q, k = torch.randn(1, 5, 2, 8, dtype=torch.float64), torch.randn(1, 8, 2, 8, dtype=torch.float64)
    behind = torch.arange(8) - torch.arange(5)[:, None] - 3
    left, right = (side if side is not None and side >= 0 else 99 for side in window)
    seen = (behind >= -left) & (behind <= right)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, k)), attn_mask=seen).transpose(1, 2)
    assert close(flash.flash_attn_func(q, k, k, window_size=window), expected)
    starts = torch.tensor([0, 5, 10], dtype=torch.int32), torch.tensor([0, 8, 16], dtype=torch.int32)
    packed = [x.repeat(1, 2, 1, 1)[0] for x in (q, k, k)]
    out, lse, _ = flash.flash_attn_varlen_func(*packed, *starts, 5, 8, window_size=window, return_attn_probs=True)
    assert close(out, expected[0].repeat(2, 1, 1))
    assert lse.shape == (2, 10)


def test_causality_of_flash_attention_1_is_aligned_at_the_upper_left() -> None:
    with provide("flash_attn"):
        flash = importlib.import_module("flash_attn.flash_attn_interface")
    q, kv = torch.randn(3, 2, 8, dtype=torch.float64), torch.randn(5, 2, 2, 8, dtype=torch.float64)
    starts = torch.tensor([0, 3]), torch.tensor([0, 5])
    out = flash.flash_attn_unpadded_kvpacked_func(q, kv, *starts, 3, 5, 0.0, causal=True)
    assert close(out, plain(q, kv[:3, 0], kv[:3, 1], True))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("dropout_p", 0.1),
        ("softcap", 30.0),
        ("alibi_slopes", torch.ones(2)),
    ],
)
def test_flash_attention_refuses_by_name_what_the_core_has_not(option: str, value: Any) -> None:
    with provide("flash_attn"):
        flash = importlib.import_module("flash_attn")
    x = torch.randn(1, 4, 2, 8)
    with pytest.raises(NotImplementedError, match=rf"flash_attn_func: {option} is not provided by this shim, got"):
        flash.flash_attn_func(x, x, x, **{option: value})
    with pytest.raises(NotImplementedError, match="flash_attn_with_kvcache is not provided"):
        flash.flash_attn_with_kvcache(x, x, x)


@pytest.mark.parametrize(("name", "values"), [("flash_attn@2.6", 4), ("flash_attn", 5)])
def test_unpadding_and_padding_are_inverse_and_return_as_many_values_as_their_version(name: str, values: int) -> None:
    with provide(name):
        padding = importlib.import_module("flash_attn.bert_padding")
    x = torch.randn(2, 5, 3, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = padding.unpad_input(x, mask)
    assert len(found) == values
    tokens, indices, starts, longest = found[:4]
    assert starts.tolist() == [0, 3, 8]
    assert (starts.dtype, longest) == (torch.int32, 5)
    assert close(padding.pad_input(tokens, indices, 2, 5), x * mask[..., None])
    assert close(padding.index_first_axis(x.flatten(0, 1), indices), tokens)
    assert close(torch.autograd.grad(tokens.sum(), x)[0], mask[..., None].expand(2, 5, 3).float())


def windows(k: Tensor, height: int, width: int, size: int) -> tuple[Tensor, Tensor]:
    """(B, H, N, K², d) keys and whether each slot lies on the map, by unfold."""
    batch, heads, cells, depth = k.shape
    maps = k.mT.reshape(batch * heads, depth, height, width)
    picked = F.unfold(maps, size, padding=size // 2).view(batch, heads, depth, size * size, cells)
    inside = F.unfold(torch.ones(1, 1, height, width, dtype=k.dtype), size, padding=size // 2)
    return picked.permute(0, 1, 4, 3, 2), inside[0].T.bool()


def test_swattention_equals_unfolded_windows_forward_and_backward() -> None:
    with provide("swattention"):
        module = importlib.import_module("swattention")
    height, width, size = 5, 4, 3
    q, k, v = (torch.randn(2, 3, 20, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    rpb = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    where = (height, width, size, 128)
    keys, inside = windows(k, height, width, size)
    scores = (q.unsqueeze(3) * keys).sum(-1) + rpb[:, None]
    scores = scores.masked_fill(~inside, -math.inf)
    assert torch.equal(module.qk_forward(q, k, *where).isneginf(), (~inside).expand(2, 3, 20, 9))
    attn = module.qk_rpb_forward(q, k, rpb, *where)
    assert torch.equal(attn.isneginf(), scores.isneginf())
    assert close(attn.masked_fill(~inside, 0.0), scores.masked_fill(~inside, 0.0))
    grad = torch.randn(2, 3, 20, 9, dtype=torch.float64)
    right = torch.autograd.grad(scores.masked_fill(~inside, 0.0), (q, k, rpb), grad)
    with torch.no_grad():
        found = module.qk_rpb_backward(grad, q, k, *where)
        assert all(close(actual, expected) for actual, expected in zip(found, right, strict=True))
        found = module.qk_backward(grad, q, k, *where)
        assert all(close(actual, expected) for actual, expected in zip(found, right, strict=False))
    p = scores.softmax(-1).detach().requires_grad_()
    values, _ = windows(v, height, width, size)
    out = (p.unsqueeze(-1) * values).sum(3)
    assert close(module.av_forward(p, v, *where), out)
    with torch.no_grad():
        found = module.av_backward(torch.ones_like(out), p, v, *where)
    for actual, expected in zip(found, torch.autograd.grad(out.sum(), (p, v)), strict=True):
        assert close(actual, expected)
    assert all(x.grad is None for x in (q, k, v, rpb, p))


@pytest.mark.parametrize(("stride", "padding", "dilation_patch"), [(1, 0, 1), (2, 1, 1), (1, 0, 2)])
def test_correlation_sums_over_channels_and_is_zero_outside(stride: int, padding: int, dilation_patch: int) -> None:
    with provide("spatial_correlation_sampler"):
        sampler = importlib.import_module("spatial_correlation_sampler")
    a, b = (torch.randn(2, 3, 6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    module = sampler.SpatialCorrelationSampler(1, 3, stride, padding, 1, dilation_patch)
    out = module(a, b)
    reach = dilation_patch + padding
    first, far = F.pad(a, (padding,) * 4), F.pad(b, (reach,) * 4)
    height, width = first.shape[2:]
    rows = []
    for y in range(3):
        for x in range(3):
            top, left = y * dilation_patch, x * dilation_patch
            rows.append((first * far[:, :, top : top + height, left : left + width]).sum(1)[:, ::stride, ::stride])
    expected = torch.stack(rows, 1).unflatten(1, (3, 3))
    assert close(out, expected)
    grad = torch.randn_like(out)
    for actual, right in zip(*(torch.autograd.grad(x, (a, b), grad) for x in (out, expected)), strict=True):
        assert close(actual, right)
    with pytest.raises(NotImplementedError, match="kernel_size other than 1 is not provided, got kernel_size=3"):
        sampler.spatial_correlation_sample(a, b, kernel_size=3)
