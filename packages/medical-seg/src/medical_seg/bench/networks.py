"""``benchmark``: networks beside MONAI's, one training step and one prediction, in one process."""

import time
from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer

from attn_core.engine import BenchmarkRequest
from medical_seg.models import create_model
from medical_seg.multi_scale_attention import GuidedOutput

DEFAULT = ("agunet_small", "daunet_small", "monai:AttentionUnet", "monai:UNet")
MONAI_OPTIONS: dict[str, Any] = {"channels": (16, 32, 64), "strides": (2, 2)}


def benchmark(
    request: BenchmarkRequest,
    *,
    size: Annotated[int, typer.Option(help="Side of the cube, or of the picture for msa.")] = 32,
    repeats: Annotated[int, typer.Option(help="Calls; the fastest counts.")] = 5,
) -> Iterator[dict[str, object]]:
    """Rows with milliseconds of a training step and of a prediction, and parameters.

    Raises: ValueError for an unknown model or a side that it does not divide.
    """
    if size < 1 or repeats < 1:
        raise ValueError(f"benchmark: --size and --repeats must be at least 1, got {size} and {repeats}")
    for name in request.models or DEFAULT:
        planar = name.startswith(("msa", "test_msa", "smp:"))
        options: dict[str, Any] = {"in_channels": 1, "out_channels": 4}
        if not planar:
            options["spatial_dims"] = 3
        if name in ("monai:UNet", "monai:AttentionUnet"):
            options |= MONAI_OPTIONS
        model = create_model(name, **options).to(request.device)
        x = torch.randn(request.batch_size or 2, 1, *(size,) * (2 if planar else 3), device=request.device)
        row: dict[str, object] = {"model": name, "parameters": sum(p.numel() for p in model.parameters())}
        row["input"] = "×".join(map(str, x.shape))
        row["step ms"] = round(_fastest(lambda m=model, x=x: _step(m, x), repeats, request.device), 2)
        model.eval()
        with torch.inference_mode():
            row["predict ms"] = round(_fastest(lambda m=model, x=x: m(x), repeats, request.device), 2)
        yield row


def _step(model: Any, x: torch.Tensor) -> None:
    output = model.train()(x)
    maps = output.logits if isinstance(output, GuidedOutput) else [output] if torch.is_tensor(output) else output
    torch.stack([m.square().mean() for m in maps]).sum().backward()
    model.zero_grad(set_to_none=True)


def _fastest(call: Any, repeats: int, device: torch.device) -> float:
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return 1000 * min(times[1:])
