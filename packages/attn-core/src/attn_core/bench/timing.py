"""Time and memory of several functions, measured in turns so that a drift of the machine hits all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attn_core.dispatch import has_triton
from attn_core.testing import peak_memory

ROUNDS = 5
# A function slower than this takes part in every other round only.
SLOW_SECONDS = 0.25


@dataclass(frozen=True)
class Times:
    """Median, 20th and 80th percentile in milliseconds."""

    median: float
    p20: float
    p80: float


def times(
    functions: dict[str, Callable[[], Any]], device: str, seconds: float, threads: int, *, quick: bool = False
) -> dict[str, Times]:
    """Times of all functions.

    Args:
        seconds: measuring time of each function at least (CPU).
        quick: one round.
    """
    if device.startswith("cuda") and has_triton():
        return {name: _gpu_times(function) for name, function in functions.items()}
    rounds = 1 if quick else ROUNDS
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds):
        for name, function in functions.items():
            seen = samples[name]
            if turn % 2 and min(seen) > SLOW_SECONDS:
                continue
            from torch.utils.benchmark import Timer  # warns of a missing CUDA runtime when it is imported

            timer = Timer("function()", globals={"function": function}, num_threads=threads)
            seen.extend(timer.blocked_autorange(min_run_time=seconds / rounds).times)
    return {name: _summary([1e3 * sample for sample in seen]) for name, seen in samples.items()}


def _summary(milliseconds: list[float]) -> Times:
    p20, median, p80 = torch.tensor(milliseconds, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return Times(float(median), float(p20), float(p80))


def _gpu_times(function: Callable[[], Any]) -> Times:
    """Triton's protocol: the second-level cache is flushed before each call."""
    from triton.testing import do_bench

    return Times(*do_bench(function, warmup=25, rep=100, quantiles=[0.5, 0.2, 0.8]))  # pyright: ignore[reportOptionalIterable]


def peak_bytes(function: Callable[[], Any], device: str) -> int:
    """Most memory that the function holds beyond what was there before, its result included."""
    if not device.startswith("cuda"):
        return peak_memory(function)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = function()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak
