"""``detection benchmark``: attentions beside the formulations that hold everything in memory."""

from collections.abc import Iterator, Mapping

from attn_core.engine import BenchmarkRequest


def benchmark(request: BenchmarkRequest) -> Iterator[Mapping[str, object]]:
    """Rows of one training step of the attention, for each formulation in turn: `detection.bench.attention`."""
    from detection.bench import attention

    return attention.benchmark(request)
