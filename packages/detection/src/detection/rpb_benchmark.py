"""``detection benchmark``: BoxRPB without a bias tensor beside the formulation that makes one, same weights and inputs.

Peak memory is counted by torch's allocator, beyond what was held before the step.
"""

import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from attn_core.bench.timing import peak_bytes
from attn_core.engine import BenchmarkRequest

from .box_rpb import BoxRPBAttention

QUERIES, ROWS, COLUMNS = 1800, 50, 84


def materialized(module: BoxRPBAttention, query: Tensor, boxes: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The equation with its (B, H, N, M) bias and scores, as the official code computes it."""
    q, k, v = (
        layer(x).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for layer, x in ((module.q, query), (module.k, key), (module.v, value))
    )
    edges = torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)[:, :, None]
    x = (torch.arange(COLUMNS, device=q.device) + 0.5)[:, None] * module.stride
    y = (torch.arange(ROWS, device=q.device) + 0.5)[:, None] * module.stride
    bias_x, bias_y = module.cpb_mlp1(edges[..., 0::2] - x), module.cpb_mlp2(edges[..., 1::2] - y)
    bias = (bias_y[:, :, :, None] + bias_x[:, :, None]).flatten(2, 3).permute(0, 3, 1, 2)
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + bias
    return module.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def benchmark(request: BenchmarkRequest) -> Iterator[Mapping[str, object]]:
    """Rows of one training step (forward and backward) of the attention, for each formulation in turn.

    Raises: ValueError if model names are given: what is measured is the attention.
    """
    if request.models:
        raise ValueError(f"benchmark: measures BoxRPB attention, not models, got {', '.join(request.models)}")
    torch.manual_seed(0)
    device = request.device
    batch = request.batch_size or 1
    module = BoxRPBAttention().to(device)
    query = torch.randn(batch, QUERIES, 256, device=device, requires_grad=True)
    key = torch.randn(batch, ROWS * COLUMNS, 256, device=device, requires_grad=True)
    boxes = torch.rand(batch, QUERIES, 4, device=device) * 400 + 50

    def ours() -> None:
        module(query, boxes, key, key, (ROWS, COLUMNS)).sum().backward()

    def plain() -> None:
        materialized(module, query, boxes, key, key).sum().backward()

    steps: dict[str, Callable[[], None]] = {"BoxRPB, no bias tensor": ours, "bias tensor": plain}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(4):  # in turns, so that both see the same machine
        for name, step in steps.items():
            _wait(device)
            began = time.perf_counter()
            step()
            _wait(device)
            times[name].append(time.perf_counter() - began)
    memory = {name: peak_bytes(step, device.type) for name, step in steps.items()}
    base = min(times["bias tensor"][1:])
    for name in steps:
        best = min(times[name][1:])
        yield {
            "training step of one layer": name,
            "queries × keys": f"{QUERIES} × {ROWS * COLUMNS}",
            "seconds": f"{best:.3f}",
            "of the time": f"{best / base:.2f}",
            "peak MiB": f"{memory[name] / 2**20:.0f}",
            "of the memory": f"{memory[name] / memory['bias tensor']:.2f}",
        }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
