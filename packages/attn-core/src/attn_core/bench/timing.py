"""Time, memory and error of several functions, measured in turns so that a drift of the machine hits all of them."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_core.testing import peak_memory, relative_error

ROUNDS = 9
# A function slower than this takes part in every other round only.
SLOW_SECONDS = 0.25
# Overwritten before each call on a GPU, so that no call finds its inputs in the second-level cache.
CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Measured:
    """What was measured of one function.

    Attributes:
        ms: median time of a call in milliseconds; ``p20`` and ``p80`` are the 20th and 80th percentile.
        mem_mb: most memory in MiB that a call held beyond what was there before; None if not asked for.
        error: largest relative error of the results; None if nothing was expected.
    """

    ms: float
    p20: float
    p80: float
    mem_mb: float | None = None
    error: float | None = None


def in_turns(
    functions: Mapping[str, Callable[[], Any]],
    *,
    device: str | torch.device = "cpu",
    rounds: int = ROUNDS,
    seconds: float = 0.0,
    threads: int | None = None,
    memory: bool = False,
    expected: Sequence[Tensor] | None = None,
) -> dict[str, Measured]:
    """Measure all functions, one after the other in each round; the first, untimed call of each is the warm-up.

    With ``seconds`` a slow function takes part in every other round only.

    Args:
        seconds: measuring time of each function over all rounds, at least; short functions are called several times
            in a row, and one sample is the mean of such a row.
        threads: CPU threads while measuring; the setting of the process by default.
        memory: measure peak memory too.
        expected: what each function should return (a tensor, or several); float64 tells most.
    """
    with _threads(threads):
        found = {name: probe(call, device, memory=memory, expected=expected) for name, call in functions.items()}
        numbers = dict.fromkeys(functions, 1)
        if seconds:
            numbers = {name: max(1, int(seconds / rounds / _once(call, device))) for name, call in functions.items()}
        samples: dict[str, list[float]] = {name: [] for name in functions}
        for turn in range(rounds):
            for name, call in functions.items():
                if seconds and turn % 2 and min(samples[name]) > 1e3 * SLOW_SECONDS:
                    continue
                samples[name] += _visit(call, numbers[name], device)
    return {name: Measured(*_spread(samples[name]), *found[name]) for name in functions}


def probe(
    call: Callable[[], Any], device: str | torch.device, *, memory: bool, expected: Sequence[Tensor] | None
) -> tuple[float | None, float | None]:
    """Peak memory in MiB and error of one call."""
    error = None
    results = call()
    if expected is not None:
        tensors = [results] if isinstance(results, Tensor) else list(results)
        error = max(relative_error(actual, wanted) for actual, wanted in zip(tensors, expected, strict=True))
    del results
    return peak_bytes(call, str(device)) / 2**20 if memory else None, error


def _once(call: Callable[[], Any], device: str | torch.device) -> float:
    return max(1e-7, 1e-3 * min(_visit(call, 1, device)[0] for _ in range(2)))


def _visit(call: Callable[[], Any], number: int, device: str | torch.device) -> list[float]:
    """Milliseconds of calls in a row: their mean on a CPU, each of them on a GPU."""
    if torch.device(device).type != "cuda":
        begin = time.perf_counter()
        for _ in range(number):
            call()
        return [1e3 * (time.perf_counter() - begin) / number]
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(number)]
    for begin, end in pairs:
        cache.zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in pairs]


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


def _spread(milliseconds: list[float]) -> tuple[float, float, float]:
    places = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    median, p20, p80 = torch.tensor(milliseconds, dtype=torch.float64).quantile(places).tolist()
    return median, p20, p80


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
