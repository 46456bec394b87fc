"""``detection benchmark``: training steps of the attentions beside the formulations that hold everything in memory.

BoxRPB at 1,800 queries beside the equation with its bias tensor; deformable attention beside the ``grid_sample``
fallback of Deformable-DETR and mmcv; same weights and inputs. Peak memory is counted by torch's allocator, beyond what
was held before the step.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_core import deformable_attention
from attn_core.bench import in_turns
from attn_core.engine import BenchmarkRequest
from detection.layers.box_rpb import BoxRPBAttention

QUERIES, SIZE = 1800, (50, 84)  # a picture of 800 × 1344 pixels at stride 16
MAPS = ((50, 84), (25, 42), (13, 21), (7, 11))  # strides 16 to 128
ROUNDS = 4
Step = Callable[[], None]


def materialized(
    module: BoxRPBAttention, query: Tensor, boxes: Tensor, key: Tensor, value: Tensor, size: tuple[int, int]
) -> Tensor:
    """BoxRPB (linear) with its (B, H, N, M) bias and scores, as the official code computes it."""
    q, k, v = (
        layer(x).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for layer, x in ((module.q, query), (module.k, key), (module.v, value))
    )
    edges = torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)[:, :, None]
    x = (torch.arange(size[1], device=q.device) + 0.5)[:, None] * module.stride
    y = (torch.arange(size[0], device=q.device) + 0.5)[:, None] * module.stride
    bias_x, bias_y = module.cpb_mlp1(edges[..., 0::2] - x), module.cpb_mlp2(edges[..., 1::2] - y)
    bias = (bias_y[:, :, :, None] + bias_x[:, :, None]).flatten(2, 3).permute(0, 3, 1, 2)
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + bias
    return module.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def sampled(value: Tensor, maps: tuple[tuple[int, int], ...], locations: Tensor, weights: Tensor) -> Tensor:
    """Multi-scale deformable attention by ``grid_sample``, all samples side by side: the fallback of its libraries."""
    batch, _, heads, width = value.shape
    queries = locations.shape[1]
    samples = []
    for level, each in enumerate(value.split([h * w for h, w in maps], 1)):
        features = each.permute(0, 2, 3, 1).reshape(batch * heads, width, *maps[level])
        grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
        samples.append(F.grid_sample(features, grid, align_corners=False))
    by_head = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    out = (torch.stack(samples, -2).flatten(-2) * by_head).sum(-1)
    return out.view(batch, heads * width, queries).transpose(1, 2)


def benchmark(request: BenchmarkRequest) -> Iterator[Mapping[str, object]]:
    """Rows of one training step (forward and backward) of the attention, for each formulation in turn.

    Raises: ValueError if model names are given: what is measured is the attention.
    """
    if request.models:
        raise ValueError(f"benchmark: measures attention, not models, got {', '.join(request.models)}")
    torch.manual_seed(0)
    batch, device = request.batch_size or 1, request.device
    yield from _rows(f"BoxRPB, {QUERIES} × {SIZE[0] * SIZE[1]}", *_box_rpb(batch, device), device)
    for queries in (sum(h * w for h, w in MAPS), 900):
        yield from _rows(f"deformable, {queries} × 16 samples", *_deformable(batch, queries, device), device)


def _box_rpb(batch: int, device: torch.device) -> tuple[dict[str, Step], str]:
    module = BoxRPBAttention().to(device)
    query = torch.randn(batch, QUERIES, 256, device=device, requires_grad=True)
    key = torch.randn(batch, SIZE[0] * SIZE[1], 256, device=device, requires_grad=True)
    boxes = torch.rand(batch, QUERIES, 4, device=device) * 400 + 50

    def ours() -> None:
        module(query, boxes, key, key, SIZE).sum().backward()

    def plain() -> None:
        materialized(module, query, boxes, key, key, SIZE).sum().backward()

    return {"no bias tensor": ours, "bias tensor": plain}, "bias tensor"


def _deformable(batch: int, queries: int, device: torch.device) -> tuple[dict[str, Step], str]:
    value = torch.randn(batch, sum(h * w for h, w in MAPS), 8, 32, device=device, requires_grad=True)
    locations = torch.rand(batch, queries, 8, len(MAPS), 4, 2, device=device, requires_grad=True)
    weights = torch.rand(batch, queries, 8, len(MAPS), 4, device=device, requires_grad=True)

    def ours() -> None:
        deformable_attention(value, MAPS, locations, weights).sum().backward()

    def plain() -> None:
        sampled(value, MAPS, locations, weights).sum().backward()

    return {"attn_core": ours, "grid_sample": plain}, "grid_sample"


def _rows(what: str, steps: Mapping[str, Step], base: str, device: torch.device) -> Iterator[Mapping[str, object]]:
    found = in_turns(steps, device=device, rounds=ROUNDS, memory=True)
    for name, one in found.items():
        yield {
            "training step of one layer": what,
            "formulation": name,
            "ms": f"{one.ms:.1f}",
            "of the time": f"{one.ms / found[base].ms:.2f}",
            "peak MiB": f"{one.mem_mb:.0f}",
            "of the memory": f"{(one.mem_mb or 0.0) / (found[base].mem_mb or 1.0):.2f}",
        }
