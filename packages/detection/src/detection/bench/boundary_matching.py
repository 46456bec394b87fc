"""Boundary matching of BMN beside the published layer, a product with a dense mask and a convolution over its bins.

``python -m detection.bench.boundary_matching`` prints both at the published size: one training step each, in turns.
Memory is what torch's allocator holds for a layer: its tables (the mask, or the plan) and the step's peak.
"""

import argparse
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attn_core.bench import in_turns
from detection.models.bmn.matching import BoundaryMatching

STEPS, CHANNELS, OUT, BINS = 100, 256, 512, 32  # as published
ROUNDS = 3


class DenseMatching(nn.Module):
    """The published layer with the weights of ours: (B, C, T) → (B, O, T, T)."""

    def __init__(self, layer: BoundaryMatching) -> None:
        super().__init__()
        bins = layer.sampling[0]
        self.bins, self.steps = bins, layer.steps
        self.mask: Tensor
        self.register_buffer("mask", dense_mask(layer))
        self.weight = nn.Parameter(layer.weight.detach().permute(1, 2, 0).contiguous()[..., None, None])
        self.bias = nn.Parameter(layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """All pairs, also those that cannot be."""
        sampled = (x @ self.mask).unflatten(2, (self.bins, self.steps, self.steps))
        return F.conv3d(sampled, self.weight, self.bias, stride=(self.bins, 1, 1)).squeeze(2)


def dense_mask(layer: BoundaryMatching) -> Tensor:
    """The mask (T, N·T·T) of a layer's samples: what each step gives to bin, start and end."""
    bins, steps = layer.sampling[0], layer.steps
    plan = layer.plan(torch.float32, layer.weight.device)
    sampled = layer.sample(torch.eye(steps, device=layer.weight.device)[None])[0]  # (T, N, P)
    mask = sampled.new_zeros(steps, bins, steps, steps)
    mask[:, :, plan.start, plan.end] = sampled
    return mask.flatten(1)


def benchmark(
    batch: int, device: torch.device | str, *, channels: int = CHANNELS, out: int = OUT
) -> Iterator[Mapping[str, object]]:
    """Rows of one training step of the layer, by gathering and with the mask; what each holds counts as memory."""
    torch.manual_seed(0)
    device = torch.device(device)
    ours = BoundaryMatching(channels, out, STEPS, bins=BINS).to(device)
    dense = DenseMatching(ours)
    plan = ours.plan(torch.float32, device)
    x = torch.randn(batch, channels, STEPS, device=device, requires_grad=True)

    def step(layer: nn.Module) -> None:
        layer.zero_grad()
        layer(x).square().mean().backward()

    tables = [table for bags in (plan.pairs, plan.steps) for table in bags]
    held = {"gather": sum(table.numel() * table.element_size() for table in tables), "dense mask": dense.mask.nbytes}
    steps = {"gather": lambda: step(ours), "dense mask": lambda: step(dense)}
    found = in_turns(steps, device=device, rounds=ROUNDS, memory=True)
    whole = {name: (one.mem_mb or 0.0) + held[name] / 2**20 for name, one in found.items()}
    for name, one in found.items():
        yield {
            "training step of one layer": f"boundary matching, batch {batch}",
            "formulation": name,
            "ms": f"{one.ms:.1f}",
            "of the time": f"{one.ms / found['dense mask'].ms:.3f}",
            "peak MiB": f"{whole[name]:.0f}",
            "of the memory": f"{whole[name] / whole['dense mask']:.3f}",
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    for row in benchmark(options.batch_size, options.device):
        print("  ".join(f"{name}: {value}" for name, value in row.items()))
