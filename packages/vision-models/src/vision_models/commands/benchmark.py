"""The verb ``benchmark``: each family against its peer in one run.

``vision-models benchmark --json FILE`` writes the rows with the environment they were measured in, and a plot.
"""

from typing import Annotated, Any

import torch
import typer

from attn_core.engine import BenchmarkRequest

DEFAULT = ("biformer_tiny", "davit_tiny", "focalnet_tiny_srf", "halonet26t")


def benchmark(
    request: BenchmarkRequest,
    *,
    compiled: Annotated[bool, typer.Option("--compile", help="Time both sides under torch.compile.")] = False,
    modules: Annotated[
        bool, typer.Option("--modules", help="Time what can be inserted into networks instead.")
    ] = False,
) -> list[dict[str, Any]]:
    """One row per model and quantity: ours, the peer, ratio, and the largest relative difference of the logits.

    Args:
        compiled: time both under ``torch.compile`` (forward only; compiling the training step takes minutes).
        modules: a row for each module of ``vision_models.insert`` in a small ResNet and a MobileNet instead.

    Raises:
        ValueError: a model whose family has no peer; models or ``--compile`` beside ``--modules``.
    """
    from vision_models.bench import biformer, mambaout, masked, spectformer, timm_peer, token_attention, windows
    from vision_models.bench.measure import environment, plot

    if modules:
        return _of_modules(request, compiled=compiled)
    from vision_models.models import create_model, family, list_models
    from vision_models.models.biformer import BiFormer
    from vision_models.models.davit import DaViT
    from vision_models.models.deit import DeiT
    from vision_models.models.dhvt import DHVT
    from vision_models.models.fan import FAN
    from vision_models.models.focalnet import FocalNet
    from vision_models.models.halonet import HaloNet
    from vision_models.models.mambaout import MambaOut
    from vision_models.models.nat import NAT
    from vision_models.models.rvt import RVT
    from vision_models.models.sparsifiner import Sparsifiner
    from vision_models.models.spectformer import SpectFormer, SpectFormerH
    from vision_models.models.transnext import TransNeXt

    peers = {
        BiFormer: biformer.rows,
        DaViT: timm_peer.rows,
        FocalNet: timm_peer.rows,
        HaloNet: timm_peer.rows,
        DeiT: masked.rows,
        DHVT: token_attention.rows,
        MambaOut: mambaout.rows,
        Sparsifiner: masked.rows,
        SpectFormer: spectformer.rows,
        SpectFormerH: spectformer.rows,
        FAN: token_attention.rows,
        RVT: token_attention.rows,
        NAT: windows.rows,
        TransNeXt: windows.rows,
    }
    rows: list[dict[str, Any]] = []
    for name in request.models or DEFAULT:
        if name in list_models() and family(name) not in peers:
            families = ", ".join(peer.__name__ for peer in peers)
            raise ValueError(f"benchmark: {name} has no peer to compare with; {families} have")
        torch.manual_seed(0)
        ours: Any = create_model(name).to(request.device)
        x = torch.randn(request.batch_size or 8, *ours.default_cfg["input_size"], device=request.device)
        rows += peers[family(name)](name, ours, x, compiled=compiled)
    rows = [{**row, **environment(request.device)} for row in rows]
    if request.json is not None and not compiled:
        plot(rows, request.json.with_suffix(".png"))
    return rows


def _of_modules(request: BenchmarkRequest, *, compiled: bool) -> list[dict[str, Any]]:
    """A row for each module and host."""
    from vision_models.bench import inserted
    from vision_models.bench.measure import environment

    if request.models or compiled:
        raise ValueError("benchmark: --modules times its own networks; leave out models and --compile")
    rows = inserted.rows(request.device, request.batch_size or 8)
    return [{**row, **environment(request.device)} for row in rows]
