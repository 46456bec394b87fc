"""``benchmark``: networks and layers beside their peers."""

from collections.abc import Iterator
from typing import Annotated

import typer

from attn_core.engine import BenchmarkRequest


def benchmark(
    request: BenchmarkRequest,
    *,
    size: Annotated[int | None, typer.Option(help="Side of the cube, or of the picture for msa.")] = None,
    repeats: Annotated[int, typer.Option(help="Calls of each side, in turns; the median counts.")] = 5,
) -> Iterator[dict[str, object]]:
    """Milliseconds and MiB beside the peer's: `medical_seg.bench.networks`."""
    from medical_seg.bench import networks

    return networks.benchmark(request, size=size, repeats=repeats)
