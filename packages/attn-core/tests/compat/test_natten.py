"""natten of four incompatible versions: names, orders of arguments, padding, and the values of windows."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_core import neighborhood_attention
from attn_core.compat import Provided
from attn_core.testing import peak_memory

Shim = Callable[..., Provided]


def data(*shape: int) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def close(actual: Tensor, expected: Tensor, bound: float = 1e-10) -> bool:
    return actual.shape == expected.shape and float((actual.detach() - expected.detach()).abs().max()) <= bound


OLD = ["0.14", "0.15", "0.17"]


@pytest.mark.parametrize("version", OLD)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_old_functions_with_a_softmax_between_equal_fused_attention(version: str, axes: int, shim: Shim) -> None:
    shim(f"natten@{version}")
    functional = importlib.import_module("natten.functional")
    if axes == 3 and version == "0.14":
        assert not hasattr(functional, "natten3dav")
        return
    dilation = 2 if axes < 3 else 1
    q, k, v = data(2, 3, *((7, 6) if axes < 3 else (4, 3, 5))[:axes], 4)
    rpb = torch.randn(3, *(5,) * axes, dtype=torch.float64, requires_grad=True)
    rules = (3, 3, dilation, dilation) if axes == 3 else (3, dilation)  # depth has sizes of its own
    scores = getattr(functional, f"natten{axes}dqkrpb")(q, k, rpb, *rules)
    assert scores.shape == (*q.shape[:-1], 3**axes)
    out = getattr(functional, f"natten{axes}dav")(scores.softmax(-1), v, *rules)
    expected, _ = neighborhood_attention(q, k, v, 3, dilation=dilation, scale=1.0, rpb=rpb)
    assert close(out, expected)
    plain = getattr(functional, f"natten{axes}dqk")(q, k, *rules)
    assert close(plain, getattr(functional, f"natten{axes}dqkrpb")(q, k, None, *rules))
    grad = torch.randn_like(out)
    pairs = zip(*(torch.autograd.grad(x, (q, k, v, rpb), grad) for x in (out, expected)), strict=True)
    assert all(close(*pair) for pair in pairs)


@pytest.mark.parametrize("dilation", [1, 4])
def test_old_functions_hold_a_fifth_beyond_their_output_at_most(dilation: int, shim: Shim) -> None:
    shim("natten@0.14")
    functional = importlib.import_module("natten.functional")
    q, k, v = (torch.randn(1, 4, 56, 56, 32) for _ in range(3))
    rpb = torch.randn(4, 13, 13)
    attn = functional.natten2dqkrpb(q, k, rpb, 7, dilation).softmax(-1)  # first calls allocate plans
    out = functional.natten2dav(attn, v, 7, dilation)
    for call, result in (
        (lambda: functional.natten2dqkrpb(q, k, rpb, 7, dilation), attn),
        (lambda: functional.natten2dav(attn, v, 7, dilation), out),
    ):
        assert peak_memory(call) <= 1.2 * result.nbytes


def test_functions_of_0_15_take_a_bias_and_additional_keys(shim: Shim) -> None:
    shim("natten@0.15")
    functional = importlib.import_module("natten.functional")
    q, k, v = data(2, 3, 6, 5, 4)
    extra_k, extra_v, _ = data(2, 3, 2, 4)
    bias = torch.randn(3, 5, 5, dtype=torch.float64)
    scores = functional.na2d_qk_with_bias(q, k, bias, 3, 1, additional_keys=extra_k)
    assert scores.shape[-1] == 11
    assert close(scores[..., 9:].flatten(2, 3), q.flatten(2, 3) @ extra_k.mT)
    assert close(functional.na2d_qk(q, k, 3, 1), functional.na2d_qk_with_bias(q, k, None, 3, 1))
    p = scores.softmax(-1)
    out = functional.na2d_av(p, v, 3, 1, extra_v)
    own = functional.na2d_av(p[..., :9], v, 3, 1)
    assert close(out, own + (p[..., 9:].flatten(2, 3) @ extra_v).unflatten(2, (6, 5)))


def test_functions_of_0_17_take_causal_axes_and_sizes_by_axis(shim: Shim) -> None:
    shim("natten@0.17")
    functional = importlib.import_module("natten.functional")
    q, k, v = data(2, 3, 7, 6, 4)
    rules: dict[str, Any] = {"kernel_size": (3, 5), "dilation": (2, 1), "is_causal": (True, False)}
    scores = functional.na2d_qk(q, k, **rules)
    out = functional.na2d_av(scores.softmax(-1), v, **rules)
    assert close(out, neighborhood_attention(q, k, v, **rules, scale=1.0)[0])
    assert bool(scores.isneginf().any())


def test_the_fifth_argument_is_the_dilation_in_0_17_and_the_stride_from_0_20_on(shim: Shim) -> None:
    x = torch.randn(1, 9, 9, 2, 4, dtype=torch.float64)
    first = x.movedim(-2, 1)
    old = shim("natten@0.17")
    dilated = importlib.import_module("natten.functional").na2d(x, x, x, 3, 2)
    old.restore()
    shim("natten@0.20")
    strided = importlib.import_module("natten").na2d(x, x, x, 3, 2)
    assert close(dilated.movedim(-2, 1), neighborhood_attention(first, first, first, 3, dilation=2)[0])
    assert close(strided.movedim(-2, 1), neighborhood_attention(first, first, first, 3, stride=2)[0])


def test_grouped_heads_lse_and_additional_keys_of_0_20(shim: Shim) -> None:
    shim("natten@0.20")
    natten = importlib.import_module("natten")
    q = torch.randn(2, 6, 5, 4, 8, dtype=torch.float64)
    k, v = (torch.randn(2, 6, 5, 2, 8, dtype=torch.float64) for _ in range(2))
    extra_k, extra_v = (torch.randn(2, 3, 4, 8, dtype=torch.float64) for _ in range(2))
    out, lse = natten.na2d(q, k, v, 3, return_lse=True)
    assert lse.shape == (2, 6, 5, 4)
    more, more_lse = natten.attention(q.flatten(1, 2), extra_k, extra_v, return_lse=True)
    merged, _ = natten.merge_attentions([out.flatten(1, 2), more], [lse.flatten(1, 2), more_lse])
    both = natten.na2d(q, k, v, 3, additional_keys=extra_k, additional_values=extra_v, backend="flex-fna")
    assert close(both.flatten(1, 2), merged)
    with pytest.raises(ValueError, match="na2d: additional_keys and additional_values must be given together"):
        natten.na2d(q, k, v, 3, additional_keys=extra_k)
    with pytest.raises(NotImplementedError, match=r"natten.attention: seqlens_\* .* not provided"):
        natten.attention(q.flatten(1, 2), extra_k, extra_v, seqlens_Q=torch.tensor([1]))
    with pytest.raises(ImportError, match="na2d_qk"):
        exec("from natten.functional import na2d_qk")


def padded(module: Any, x: Tensor, window: int) -> Tensor:
    """Zeros at the end of each axis before the projection, cut off behind the attention."""
    h, w = x.shape[1:3]
    whole = F.pad(x, (0, 0, 0, max(0, window - w), 0, max(0, window - h)))
    q, k, v = module.qkv(whole).unflatten(-1, (3, module.num_heads, -1)).movedim(-2, 1).unbind(-2)
    rules: dict[str, Any] = {"dilation": module.dilation, "scale": module.scale, "rpb": module.rpb}
    out, _ = neighborhood_attention(q, k, v, module.kernel_size, **rules, backend="reference")
    return module.proj(out.movedim(1, -2).flatten(-2)[:, :h, :w])


@pytest.mark.parametrize("size", [(9, 8), (4, 8), (4, 5)])
def test_0_14_pads_small_inputs_before_the_projection(size: tuple[int, int], shim: Shim) -> None:
    shim("natten@0.14")
    natten = importlib.import_module("natten")
    assert not hasattr(natten, "context")
    module = natten.NeighborhoodAttention2D(8, kernel_size=3, dilation=2, num_heads=2, qkv_bias=True).double()
    torch.nn.init.normal_(module.rpb)
    torch.nn.init.normal_(module.qkv.bias)
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    assert close(module(x), padded(module, x, 6))
    assert sorted(module.state_dict()) == ["proj.bias", "proj.weight", "qkv.bias", "qkv.weight", "rpb"]


def test_0_17_refuses_small_inputs_and_has_no_bias_by_default(shim: Shim) -> None:
    shim("natten@0.17")
    natten = importlib.import_module("natten")
    assert hasattr(natten, "context")
    module = natten.NeighborhoodAttention2D(8, 2, 3, dilation=None)
    assert module.rpb is None
    with pytest.raises(ValueError, match=r"must not exceed the 2 cells of axis 0, .*; natten 0.14 and 0.15 pad"):
        module(torch.randn(1, 2, 5, 8))
    with pytest.raises(NotImplementedError, match="rel_pos_bias=True is not defined for causal axes"):
        natten.NeighborhoodAttention2D(8, 2, 3, 1, True, True)


@pytest.mark.parametrize("version", OLD)
def test_dropped_attention_weights_are_unbiased_and_off_in_eval(version: str, shim: Shim) -> None:
    shim(f"natten@{version}")
    natten = importlib.import_module("natten")
    module = natten.NeighborhoodAttention1D(4, 2, 3, attn_drop=0.5).double()
    x = torch.randn(1, 8, 4, dtype=torch.float64).expand(4000, 8, 4)
    with torch.no_grad():
        dropped, whole = module(x), module.eval()(x)
    assert not close(dropped, whole)
    # 4000 draws of weights in [0, 2]: the standard error is about 0.01
    assert close(dropped.mean(0), whole[0], 0.08)


ARGUMENTS = {
    "0.14": ["dim", "num_heads", "kernel_size", "dilation", "bias", "qkv_bias", "qk_scale", "attn_drop", "proj_drop"],
    "0.17": [
        *("dim", "num_heads", "kernel_size", "dilation", "is_causal", "rel_pos_bias", "qkv_bias", "qk_scale"),
        *("attn_drop", "proj_drop"),
    ],
    "0.20": [
        *("embed_dim", "num_heads", "kernel_size", "stride", "dilation", "is_causal", "qkv_bias", "qk_scale"),
        "proj_drop",
    ],
}


@pytest.mark.parametrize("version", ARGUMENTS)
@pytest.mark.parametrize("axes", [1, 2])
def test_modules_take_the_originals_arguments_in_their_order(version: str, axes: int, shim: Shim) -> None:
    shim(f"natten@{version}")
    module = getattr(importlib.import_module("natten"), f"NeighborhoodAttention{axes}D")
    assert list(inspect.signature(module).parameters) == ARGUMENTS[version]
    x = torch.randn(2, *(7, 6)[:axes], 8)
    assert module(8, 2, 3)(x).shape == x.shape


def test_volumes_of_0_15_have_a_depth_of_their_own(shim: Shim) -> None:
    shim("natten@0.15")
    module = importlib.import_module("natten").NeighborhoodAttention3D(8, 2, 3, kernel_size_d=5, dilation=1)
    assert module.rpb.shape == (2, 9, 5, 5)
    assert module(torch.randn(1, 5, 4, 3, 8)).shape == (1, 5, 4, 3, 8)


def test_the_counters_handle_gives_the_counter_back(shim: Shim) -> None:
    shim("natten@0.14")
    counter = object()
    assert importlib.import_module("natten.flops").add_natten_handle(counter) is counter
