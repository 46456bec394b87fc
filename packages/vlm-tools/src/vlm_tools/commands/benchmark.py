"""``vlm-tools benchmark``: what methods cost."""

from typing import Annotated, Any

import typer

from attn_core.engine import BenchmarkRequest


def benchmark(
    request: BenchmarkRequest,
    *,
    tokens: Annotated[int, typer.Option(help="Length of the prompt.", min=1400)] = 4096,
    after: Annotated[int | None, typer.Option(help="Tokens behind the image (default: all but 35).", min=1)] = None,
    repeats: Annotated[int, typer.Option(help="Calls in turns; medians are reported.", min=1)] = 3,
) -> list[dict[str, Any]]:
    """Time and memory of a prompt under each method: `vlm_tools.bench.prefill`."""
    from vlm_tools.bench import prefill

    return prefill.benchmark(request, tokens=tokens, after=after, repeats=repeats)
