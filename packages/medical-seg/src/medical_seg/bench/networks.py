"""``benchmark``: what this package claims to save, measured beside the plain formulation or MONAI in one process.

``position_attention``: a layer of 256 channels on 24³ voxels beside its N×N form. ``msa``: the whole network at 256²
beside the same one with N×N maps. ``ss2d``: SS2D of 48 channels on 32² tokens beside itself with the loop over tokens
of Mamba's reference. ``agunet``, ``daunet``: beside MONAI's AttentionUnet with the same channels.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from attn_core.bench import in_turns
from attn_core.catalog import did_you_mean
from attn_core.engine import BenchmarkRequest
from attn_core.testing import peak_memory
from medical_seg.bench.plain import PlainPositionAttention, PlainSS2D, with_plain_attention
from medical_seg.layers.dual_attention import PositionAttention
from medical_seg.layers.state_space.ss2d import SS2D
from medical_seg.models import create_model
from medical_seg.models.multi_scale_attention import GuidedOutput, guided_loss

FILTERS = (16, 32, 64)
# Side of the cube or picture, samples.
SETTINGS = {"position_attention": (24, 1), "msa": (256, 1), "agunet": (48, 1), "daunet": (48, 1), "ss2d": (32, 1)}
Pair = dict[str, nn.Module]


def benchmark(
    request: BenchmarkRequest,
    *,
    size: int | None = None,
    repeats: int = 5,
) -> Iterator[dict[str, object]]:
    """Rows of milliseconds and of MiB held at the worst moment: ours, the peer's, their ratio.

    Args:
        size: side of the cube, or of the picture for ``msa``.
        repeats: calls of each side, in turns; the median counts.

    Raises: ValueError for an unknown name, or a side that the network does not divide.
    """
    if (size is not None and size < 1) or repeats < 1:
        raise ValueError(f"benchmark: --size and --repeats must be at least 1, got {size} and {repeats}")
    for name in request.models or SETTINGS:
        if name not in SETTINGS:
            raise ValueError(f"benchmark: unknown name {name!r}{did_you_mean(name, SETTINGS)}")
        side, batch = size or SETTINGS[name][0], request.batch_size or SETTINGS[name][1]
        pair, x, peer = _pair(name, side, batch, request.device)
        setting = {"what": name, "input": "×".join(map(str, x.shape)), "peer is": peer}
        for quantity, call in (("training step", _step), ("forward", _forward)):
            for model in pair.values():
                model.train(quantity == "training step")
            yield setting | _row(f"{quantity}, ms", _milliseconds(call, pair, x, repeats))
            yield setting | _row(f"{quantity}, MiB", {key: _peak(call, model, x) for key, model in pair.items()})


def _pair(name: str, side: int, batch: int, device: torch.device) -> tuple[Pair, Tensor, str]:
    torch.manual_seed(0)
    if name == "position_attention":
        ours = PositionAttention(256, 3, bias=False)
        nn.init.constant_(ours.gamma, 0.5)
        x = torch.randn(batch, 256, *(side,) * 3) * 0.1
        return _placed(ours, PlainPositionAttention(ours), device), x.to(device).requires_grad_(), "N×N map"
    if name == "ss2d":
        block = SS2D(48)
        x = torch.randn(batch, side, side, 48)
        return _placed(block, PlainSS2D(block), device), x.to(device).requires_grad_(), "Mamba's loop over tokens"
    if name == "msa":
        network = create_model("msa")
        peer = with_plain_attention(network)
        network.to(memory_format=torch.channels_last)  # as SegmentationTask trains it
        x = torch.randn(batch, 1, side, side)
        return _placed(network, peer, device), x.to(device), "N×N maps"
    network = create_model(name, filters=FILTERS)
    peer = create_model("monai:AttentionUnet", spatial_dims=3, in_channels=1, out_channels=2, channels=FILTERS,
                        strides=(2,) * (len(FILTERS) - 1))  # fmt: skip
    x = torch.randn(batch, 1, *(side,) * 3)
    return _placed(network, peer, device), x.to(device), "MONAI's AttentionUnet"


def _placed(ours: nn.Module, peer: nn.Module, device: torch.device) -> Pair:
    return {"ours": ours.to(device), "peer": peer.to(device)}


def _row(quantity: str, values: dict[str, float]) -> dict[str, object]:
    ratio = values["ours"] / values["peer"]
    return {"quantity": quantity, **{key: round(value, 1) for key, value in values.items()}, "ratio": f"{ratio:.3f}"}


def _forward(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def _step(model: nn.Module, x: Tensor) -> None:
    output: Any = model(x)
    if isinstance(output, GuidedOutput):
        target = torch.zeros(len(x), *x.shape[2:], dtype=torch.long, device=x.device)
        torch.stack(list(guided_loss(output, target).values())).sum().backward()
    else:
        output.square().mean().backward()
    model.zero_grad(set_to_none=True)
    x.grad = None


def _milliseconds(call: Callable[[nn.Module, Tensor], None], pair: Pair, x: Tensor, repeats: int) -> dict[str, float]:
    calls = {key: lambda model=model: call(model, x) for key, model in pair.items()}
    return {key: found.ms for key, found in in_turns(calls, device=x.device, rounds=repeats).items()}


def _peak(call: Callable[[nn.Module, Tensor], None], model: nn.Module, x: Tensor) -> float:
    """MiB that a call allocates at its worst moment, beyond what lives before it."""
    if x.device.type != "cuda":
        return peak_memory(lambda: call(model, x)) / 2**20
    torch.cuda.reset_peak_memory_stats(x.device)
    before = torch.cuda.memory_allocated(x.device)
    call(model, x)
    return (torch.cuda.max_memory_allocated(x.device) - before) / 2**20
