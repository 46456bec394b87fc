"""The Triton kernels on a GPU: every dtype at real sizes, compiled graphs, equal bits, memory."""

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
    group_attention,
    linear_attention,
    linear_scan,
    merge_attention,
    neighborhood_attention,
    neighborhood_scores,
    neighborhood_values,
    selective_scan,
    topk_route,
    window_index,
)
from attn_core.testing import TOLERANCE, Case, assert_matches_reference, every_case, gradients, leaves, run
from attn_core.testing.real_sizes import real_cases

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPERATORS = (
    attention,
    block_attention,
    group_attention,
    channel_attention,
    additive_attention,
    neighborhood_attention,
    neighborhood_scores,
    neighborhood_values,
    deformable_attention,
    linear_attention,
    linear_scan,
    merge_attention,
    selective_scan,
)
# Complex states are the torch backend's.
CASES = [case for case in every_case() if case.operator in OPERATORS and "conjugate pairs" not in case.name]


REAL = real_cases()


def heads(batch: int, tokens: int) -> Tensor:
    """Four heads of width 32, split from a projection."""
    return torch.randn(batch, tokens, 4, 32, device="cuda").bfloat16().transpose(1, 2).requires_grad_()


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
    function: Any = torch.compile(lambda *a, **k: case.operator(*a, **k, backend="triton"), fullgraph=True)
    compiled = function(*args, **kwargs)
    for expected, actual in zip(eager, compiled, strict=True):
        torch.testing.assert_close(actual, expected, atol=TOLERANCE[torch.float32], rtol=0, equal_nan=True)
    for expected, actual in zip(
        gradients(eager, leaves(args, kwargs)), gradients(compiled, leaves(args, kwargs)), strict=True
    ):
        torch.testing.assert_close(actual, expected, atol=2 * TOLERANCE[torch.float32], rtol=0)


def test_memory_of_a_routed_step_is_flat_in_top_k() -> None:
    peaks = []
    for topk in (2, 4, 16):
        tokens = window_index(56, 56, (8, 8), device="cuda")
        q, k, v = (heads(2, 56 * 56) for _ in range(3))
        q_regions, k_regions = torch.randn(2, 2, 49, 128, device="cuda")
        table, _ = topk_route(q_regions, k_regions, topk)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out, _ = block_attention(q, k, v, tokens, tokens, table, backend="triton")
        out.sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[-1] <= 1.05 * peaks[0], peaks


def test_memory_of_axis_bias_grows_linearly() -> None:
    def peak(rows: int) -> int:
        q, k, v = (heads(1, rows * 64) for _ in range(3))
        tables = [
            torch.randn(1, 4, rows * 64, size, device="cuda").bfloat16().requires_grad_() for size in (16, rows * 4)
        ]
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out, _ = attention(q, k, v, axis_bias=tables, backend="triton")
        out.sum().backward()
        return torch.cuda.max_memory_allocated() - before

    # Twice the tokens with a table twice as wide: the operands grow up to fourfold in the table alone, scores would
    # need 4 · 4096² · 2 bytes.
    assert peak(64) < 4 * 4096**2 * 2 / 4
