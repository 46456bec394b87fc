"""BiFormer against its official formulation in one run: time of forward and training step, peak memory.

``vision-models benchmark --json FILE`` writes the rows with the environment they were measured in, and a plot.
"""

import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from attn_core.engine import BenchmarkRequest
from attn_core.testing import peak_memory
from vision_models.bilevel_routing import RoutedAttention
from vision_models.models import create_model

from .gathered import GatheredRouting, gathered

REPEATS = 9
TOPKS = (1, 4, 16)
LARGE_SIDE = 224  # stage-1 map of an 896² image


def benchmark(
    request: BenchmarkRequest,
    *,
    compiled: Annotated[bool, typer.Option("--compile", help="Time both sides under torch.compile.")] = False,
) -> list[dict[str, Any]]:
    """One row per model and quantity: ours, gathered, ratio; then memory against top-k at 896².

    Args:
        compiled: time both under ``torch.compile`` (forward only; compiling the training step takes minutes).
    """
    batch = request.batch_size or 8
    rows: list[dict[str, Any]] = []
    for name in request.models or ["biformer_tiny"]:
        rows += _model_rows(name, batch, request.device, compiled)
    if not compiled:
        rows += _large_rows(request.device)
    where = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(request.device) if request.device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
    }
    rows = [{**row, **where} for row in rows]
    if request.json is not None and not compiled:
        _plot(rows, request.json.with_suffix(".png"))
    return rows


def _model_rows(name: str, batch: int, device: torch.device, compiled: bool) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    ours = create_model(name).to(device).eval()
    models: dict[str, nn.Module] = {"ours": ours, "gathered": gathered(ours)}
    x = torch.randn(batch, 3, 224, 224, device=device)
    with torch.no_grad():
        error = (models["ours"](x) - models["gathered"](x)).abs().max() / models["gathered"](x).abs().max()
    if compiled:
        models = {side: torch.compile(model) for side, model in models.items()}  # pyright: ignore[reportAssignmentType]
    setting = f"{name}, batch {batch}, 224²" + (", torch.compile" if compiled else "")

    def forward(model: nn.Module) -> None:
        with torch.no_grad():
            model(x)

    def step(model: nn.Module) -> None:
        model(x).square().mean().backward()
        model.zero_grad(set_to_none=True)

    rows = [_row(setting, "forward, ms", _times(forward, models, device), float(error))]
    if not compiled:
        rows.append(_row(setting, "of it linear layers, ms", _linear_times(ours, x, device), float(error)))
    if not compiled:
        for model in models.values():
            model.train()
        rows.append(_row(setting, "training step, ms", _times(step, models, device), float(error)))
        peaks = {side: _peak(lambda model=model: step(model), device) for side, model in models.items()}
        rows.append(_row(setting, "training step, peak MiB", peaks, float(error)))
        for model in models.values():
            model.eval()
        peaks = {side: _peak(lambda model=model: forward(model), device) for side, model in models.items()}
        rows.append(_row(setting, "forward, peak MiB", peaks, float(error)))
    return rows


def _linear_times(model: nn.Module, x: Tensor, device: torch.device) -> dict[str, float]:
    """Milliseconds of the linear layers of one forward pass by themselves: the floor that attention cannot lower."""
    seen: list[tuple[nn.Module, Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda layer, args, _: seen.append((layer, torch.randn_like(args[0]))))
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    totals = {"ours": 0.0, "gathered": 0.0}
    for layer, tokens in seen:
        plain = nn.Linear(1, 1, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias  # pyright: ignore[reportAttributeAccessIssue]

        def call(module: nn.Module, tokens: Tensor = tokens) -> None:
            with torch.no_grad():
                module(tokens)

        for side, value in _times(call, {"ours": layer, "gathered": plain}, device).items():
            totals[side] += value
    return totals


def _large_rows(device: torch.device) -> list[dict[str, Any]]:
    """Routed attention of stage 1 at 896² (224² tokens, 7×7 regions): forward and backward of one image."""
    rows = []
    for topk in TOPKS:
        attention = RoutedAttention(64, topk=topk, n_win=7).to(device)
        peer = RoutedAttention(64, topk=topk, n_win=7).to(device)
        peer.load_state_dict(attention.state_dict())
        peer.__class__ = GatheredRouting
        x = torch.randn(1, LARGE_SIDE, LARGE_SIDE, 64, device=device)

        def step(module: nn.Module, x: Tensor = x) -> None:
            module(x).sum().backward()
            module.zero_grad(set_to_none=True)

        step(attention)  # parameters' one-time buffers are no part of the question
        ours = _peak(lambda module=attention: step(module), device)
        # At 16 of 49 regions the gathered scores alone take 1024² · 16 · 2 · 4 B · 49 / 2²⁰ ≈ 6 GiB: computed, not run.
        other = _peak(lambda module=peer: step(module), device) if topk == 1 else float("nan")
        rows.append(
            _row(f"stage-1 attention at 896², top-k {topk}", "peak MiB", {"ours": ours, "gathered": other}, 0.0)
        )
    return rows


def _row(setting: str, quantity: str, values: dict[str, float], error: float) -> dict[str, Any]:
    ratio = values["ours"] / values["gathered"]
    return {
        "setting": setting,
        "quantity": quantity,
        "ours": round(values["ours"], 1),
        "gathered": round(values["gathered"], 1) if values["gathered"] == values["gathered"] else "not run",
        "ratio": f"{ratio:.2f}" if ratio == ratio else "",
        "error": f"{error:.0e}",
    }


def _times(call: Callable[[nn.Module], None], models: dict[str, nn.Module], device: torch.device) -> dict[str, float]:
    """Median milliseconds; the sides take turns, so that a busy machine hurts both."""
    seconds: dict[str, list[float]] = {side: [] for side in models}
    for repeat in range(REPEATS + 1):
        for side, model in models.items():
            start = time.perf_counter()
            call(model)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat > 0:
                seconds[side].append(time.perf_counter() - start)
    return {side: 1e3 * statistics.median(values) for side, values in seconds.items()}


def _peak(call: Callable[[], None], device: torch.device) -> float:
    """MiB that one call allocates at its worst moment, beyond what lives before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return peak_memory(call) / 2**20


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of ours and gathered for every row that has both."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    both = [row for row in rows if row["ratio"]]
    figure = Figure(figsize=(2.6 * len(both), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, row in zip(figure.subplots(1, len(both), squeeze=False)[0], both, strict=True):
        bars = axis.bar(["ours", "gathered"], [row["ours"], row["gathered"]], color=["#1c7ed6", "#adb5bd"], width=0.6)
        axis.bar_label(bars, fmt="%.0f", fontsize=9)
        axis.set_title(f"{row['quantity']}\n{row['setting']}", fontsize=8, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel(f"ratio {row['ratio']}", fontsize=9)
    figure.savefig(path, dpi=130)
