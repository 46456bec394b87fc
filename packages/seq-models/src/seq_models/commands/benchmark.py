"""``seq-models benchmark``: causal models beside their peers."""

from collections.abc import Iterator, Mapping

from attn_core.engine import BenchmarkRequest


def benchmark(request: BenchmarkRequest) -> Iterator[Mapping[str, object]]:
    """Training steps beside the peer's, and decoding after short and long texts: `seq_models.bench.causal`."""
    from seq_models.bench.causal import benchmark_causal

    return benchmark_causal(request)
