"""The Triton kernels on a GPU: every dtype at real sizes, compiled graphs, equal bits, memory."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_core import (
    additive_attention,
    attention,
    block_attention,
    channel_attention,
    deformable_attention,
    focal_modulation,
    group_attention,
    halo_index,
    linear_attention,
    linear_scan,
    merge_attention,
    neighborhood_attention,
    selective_scan,
    topk_route,
    window_index,
)
from attn_core.testing import TOLERANCE, Case, assert_matches_reference, every_case, gradients, leaves, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPERATORS = (
    attention,
    block_attention,
    group_attention,
    channel_attention,
    additive_attention,
    neighborhood_attention,
    deformable_attention,
    linear_attention,
    linear_scan,
    merge_attention,
    selective_scan,
)
CASES = [case for case in every_case() if case.operator in OPERATORS]


def data(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to("cuda", dtype).requires_grad_()


def heads(batch: int, tokens: int, count: int, width: int, dtype: torch.dtype) -> Tensor:
    """Heads split from a projection, as models hand them over."""
    return data(batch, tokens, count, width, dtype=dtype).detach().transpose(1, 2).requires_grad_()


def real(
    operator: Callable[..., Any], name: str, build: Callable[[torch.dtype], tuple[list[Any], dict[str, Any]]]
) -> Case:
    return Case(operator, name, lambda dtype, device: build(dtype))


def plain(dtype: torch.dtype, width: int, **options: Any) -> tuple[list[Any], dict[str, Any]]:
    return [heads(2, 777, 4, width, dtype), heads(2, 1031, 2, width, dtype), heads(2, 1031, 2, width, dtype)], options


def box_bias(dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
    tables = [data(2, 4, 300, 50, dtype=dtype), data(2, 1, 300, 84, dtype=dtype)]
    return [heads(2, n, 4, 32, dtype) for n in (300, 4200, 4200)], {"axis_bias": tables}


def volume(dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
    tables = [data(1, 2, 512, n, dtype=dtype) for n in (8, 10, 12)]
    return [heads(1, n, 2, 32, dtype) for n in (512, 960, 960)], {"axis_bias": tables}


def relative_bias(dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
    return [heads(16, 196, 4, 32, dtype) for _ in range(3)], {"bias": data(1, 4, 196, 196, dtype=dtype)}


def biformer(dtype: torch.dtype, side: int, topk: int, soft: bool) -> tuple[list[Any], dict[str, Any]]:
    tokens = window_index(side, side, (side // 7, side // 7), device="cuda")
    q, k, v = (heads(2, side * side, 4, 32, dtype) for _ in range(3))
    regions = torch.randn(2, 2, 49, 128, device="cuda")
    table, weight = topk_route(regions[0], regions[1], topk)
    return [q, k, v, tokens, tokens, table], {"kv_weight": weight.to(dtype).requires_grad_()} if soft else {}


def halo(dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
    indices = [window_index(32, 32, (8, 8), device="cuda"), halo_index(32, 32, (8, 8), (3, 3), device="cuda")]
    tables = [data(2, 4, 1024, 14, dtype=dtype) for _ in range(2)]
    return [*(heads(2, 1024, 4, 32, dtype) for _ in range(3)), *indices], {"axis_bias": tables}


def prompt(dtype: torch.dtype, weighted: bool) -> tuple[list[Any], dict[str, Any]]:
    """Four classes of tokens, as in the redistribution of a vision-language model."""
    group = torch.randint(0, 4, (1, 1031), device="cuda")
    options: dict[str, Any] = {"causal": "lower_right"}
    if weighted:
        options["group_weight"] = data(2, 4, 777, 4, dtype=torch.float32)
    return [*plain(dtype, 128)[0], group, 4], options


def channel_groups(dtype: torch.dtype, tokens: int, count: int, width: int) -> tuple[list[Any], dict[str, Any]]:
    return [heads(2, tokens, count, width, dtype) for _ in range(3)], {"scale": tokens**-0.5}


def pointer(dtype: torch.dtype, value: int | None) -> tuple[list[Any], dict[str, Any]]:
    args = [data(2, 200, 128, dtype=dtype), data(2, 333, 128, dtype=dtype)]
    args.append((data(128, dtype=dtype).detach() / 8).requires_grad_())
    options = {"key_mask": torch.rand(2, 333, device="cuda") > 0.3}
    return [*args, data(2, 333, value, dtype=dtype)] if value else args, options


def neighborhood(
    dtype: torch.dtype, grid: tuple[int, ...], kernel: int, **options: Any
) -> tuple[list[Any], dict[str, Any]]:
    maps = (heads(2, math.prod(grid), 4, 32, dtype).detach().unflatten(2, grid) for _ in range(3))
    return [*(x.requires_grad_() for x in maps), kernel], options


def retention(
    dtype: torch.dtype, width: int, *, state: bool = False, **options: Any
) -> tuple[list[Any], dict[str, Any]]:
    decay = -torch.tensor([0.5, 0.05, 0.005, 0.0], device="cuda") if options.get("causal", True) else None
    start = {"initial_state": data(2, 4, width, width, dtype=torch.float32)} if state else {}
    args = [(heads(2, 777, 4, width, dtype).detach() / width**0.5).requires_grad_() for _ in range(3)]
    return args, {"log_decay": decay, **start, **options}


def gated(dtype: torch.dtype, gates: tuple[int, ...], features: tuple[int, ...]) -> tuple[list[Any], dict[str, Any]]:
    return [torch.rand(2, 500, *gates, device="cuda").requires_grad_(), data(2, 500, *features, dtype=dtype)], {}


def state_space(dtype: torch.dtype, channels: int, width: int, **options: Any) -> tuple[list[Any], dict[str, Any]]:
    decay = -torch.arange(1.0, width + 1, device="cuda").repeat(channels, 1)
    args = [data(2, channels, 784, dtype=dtype), (torch.randn(2, channels, 784, device="cuda") - 3).requires_grad_()]
    args += [decay.requires_grad_(), *(data(2, 2, width, 784, dtype=dtype) for _ in range(2))]
    return args, {"z": data(2, channels, 784, dtype=dtype), "delta_softplus": True, **options}


def focal(dtype: torch.dtype, side: int, channels: int) -> tuple[list[Any], dict[str, Any]]:
    projection = data(2, channels + 4, side, side, dtype=dtype).detach()
    weights = [(data(channels, 1, k, k, dtype=dtype).detach() / k).requires_grad_() for k in (3, 5, 7)]
    return [*(t.clone().requires_grad_() for t in projection.split((channels, 4), 1)), weights], {}


REAL = [
    *(real(attention, f"width {w}", lambda dtype, w=w: plain(dtype, w)) for w in (20, 32, 64, 80, 128, 256)),
    real(attention, "causal", lambda dtype: plain(dtype, 64, causal="lower_right")),
    real(attention, "box bias", box_bias),
    real(attention, "volume", volume),
    real(attention, "relative bias", relative_bias),
    real(block_attention, "stage 1", lambda dtype: biformer(dtype, 56, 1, False)),
    real(block_attention, "stage 2", lambda dtype: biformer(dtype, 28, 4, False)),
    real(block_attention, "stage 3, soft", lambda dtype: biformer(dtype, 14, 16, True)),
    real(block_attention, "halo", halo),
    real(group_attention, "masses of a prompt", lambda dtype: prompt(dtype, False)),
    real(group_attention, "redistributed prompt", lambda dtype: prompt(dtype, True)),
    real(channel_attention, "stage 1", lambda dtype: channel_groups(dtype, 3136, 3, 32)),
    real(channel_attention, "wide", lambda dtype: channel_groups(dtype, 1000, 1, 128)),
    real(additive_attention, "pointer", lambda dtype: pointer(dtype, None)),
    real(additive_attention, "pooled", lambda dtype: pointer(dtype, 96)),
    real(neighborhood_attention, "image", lambda dtype: neighborhood(dtype, (28, 30), 7, dilation=2)),
    real(neighborhood_attention, "causal", lambda dtype: neighborhood(dtype, (1000,), 127, is_causal=True)),
    real(neighborhood_attention, "volume", lambda dtype: neighborhood(dtype, (7, 10, 12), 5, border="truncated")),
    real(linear_attention, "lightning", lambda dtype: retention(dtype, 128, state=True)),
    real(linear_attention, "both ways", lambda dtype: retention(dtype, 40, causal=False, scale=1 / 777)),
    real(linear_scan, "own gates", lambda dtype: gated(dtype, (300,), (300,))),
    real(linear_scan, "weights", lambda dtype: gated(dtype, (), (32, 32))),
    real(selective_scan, "stage 2", lambda dtype: state_space(dtype, 192, 16)),
    real(selective_scan, "from the right", lambda dtype: state_space(dtype, 36, 24, reverse=True)),
    real(focal_modulation, "stage 1", lambda dtype: focal(dtype, 56, 96)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *REAL], ids=str)
def test_equals_float64_reference(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(case, dtype, "triton", device="cuda")


@pytest.mark.parametrize("case", REAL, ids=str)
def test_two_runs_give_equal_bits(case: Case) -> None:
    runs = []
    for _ in range(2):
        args, kwargs = case.inputs(torch.bfloat16, "cuda")
        outputs = run(case, args, kwargs, "triton")
        runs.append([*outputs, *gradients(outputs, leaves(args, kwargs))])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.compile
@pytest.mark.parametrize("case", [REAL[2], REAL[7], REAL[10], REAL[13]], ids=str)
def test_compiles_to_one_graph_with_the_same_results(case: Case) -> None:
    args, kwargs = case.inputs(torch.float32, "cuda")
    eager = run(case, args, kwargs, "triton")
    compiled = torch.compile(lambda *a, **k: case.operator(*a, **k, backend="triton"), fullgraph=True)(*args, **kwargs)
    for expected, actual in zip(eager, compiled, strict=True):
        torch.testing.assert_close(actual, expected, atol=TOLERANCE[torch.float32], rtol=0, equal_nan=True)
    for expected, actual in zip(
        gradients(eager, leaves(args, kwargs)), gradients(compiled, leaves(args, kwargs)), strict=True
    ):
        torch.testing.assert_close(actual, expected, atol=2 * TOLERANCE[torch.float32], rtol=0)


def test_memory_of_a_routed_step_is_flat_in_top_k() -> None:
    peaks = []
    for topk in (2, 4, 16):
        args, kwargs = biformer(torch.bfloat16, 56, topk, False)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out, _ = block_attention(*args, **kwargs, backend="triton")
        out.sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[-1] <= 1.05 * peaks[0], peaks


def test_memory_of_axis_bias_grows_linearly() -> None:
    def peak(rows: int) -> int:
        q, k, v = (heads(1, rows * 64, 4, 32, torch.bfloat16) for _ in range(3))
        tables = [data(1, 4, rows * 64, size, dtype=torch.bfloat16) for size in (16, rows * 4)]
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out, _ = attention(q, k, v, axis_bias=tables, backend="triton")
        out.sum().backward()
        return torch.cuda.max_memory_allocated() - before

    # Twice the tokens with a table twice as wide: the operands grow up to fourfold in the table alone, scores would
    # need 4 · 4096² · 2 bytes.
    assert peak(64) < 4 * 4096**2 * 2 / 4
