"""What every benchmark of this package measures with: times in turns, peak memory, one row for each quantity."""

import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attn_core.testing import peak_memory

REPEATS = 9


def model_rows(
    name: str, ours: nn.Module, peer: nn.Module, label: str, x: Tensor, *, compiled: bool
) -> list[dict[str, Any]]:
    """Forward pass and training step of two networks with the same weights: time, peak memory, error beside them.

    Args:
        name: of the model. label: what the peer is.
        x: the batch of images.
        compiled: time both under ``torch.compile`` (forward only; compiling the training step takes minutes).
    """
    device = x.device
    models: dict[str, nn.Module] = {"ours": ours.eval(), "peer": peer.eval()}
    with torch.no_grad():
        expected = models["peer"](x)
        error = float((models["ours"](x) - expected).abs().max() / expected.abs().max())
    if compiled:
        models = {side: torch.compile(model) for side, model in models.items()}  # pyright: ignore[reportAssignmentType]
    setting = f"{name}, batch {len(x)}, {x.shape[2]}²" + (", torch.compile" if compiled else "")

    def forward(model: nn.Module) -> None:
        with torch.no_grad():
            model(x)

    def step(model: nn.Module) -> None:
        model(x).square().mean().backward()
        model.zero_grad(set_to_none=True)

    rows = [row(setting, label, "forward, ms", times(forward, models, device), error)]
    if compiled:
        return rows
    peaks = {side: peak(lambda model=model: forward(model), device) for side, model in models.items()}
    rows.append(row(setting, label, "forward, peak MiB", peaks, error))
    for model in models.values():
        model.train()
    rows.append(row(setting, label, "training step, ms", times(step, models, device), error))
    peaks = {side: peak(lambda model=model: step(model), device) for side, model in models.items()}
    rows.append(row(setting, label, "training step, peak MiB", peaks, error))
    for model in models.values():
        model.eval()
    return rows


def row(setting: str, label: str, quantity: str, values: dict[str, float], error: float) -> dict[str, Any]:
    """One line of the table; a peer of NaN was not run."""
    ratio = values["ours"] / values["peer"]
    return {
        "setting": setting,
        "quantity": quantity,
        "against": label,
        "ours": round(values["ours"], 1),
        "peer": round(values["peer"], 1) if values["peer"] == values["peer"] else "not run",
        "ratio": f"{ratio:.2f}" if ratio == ratio else "",
        "error": f"{error:.0e}",
    }


def times(call: Callable[[nn.Module], None], models: dict[str, nn.Module], device: torch.device) -> dict[str, float]:
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


def peak(call: Callable[[], None], device: torch.device) -> float:
    """MiB that one call allocates at its worst moment, beyond what lives before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return peak_memory(call) / 2**20


def environment(device: torch.device) -> dict[str, Any]:
    """Where rows were measured."""
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of ours and of the peer for every row that has both, eight in a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    both = [entry for entry in rows if entry["ratio"]]
    columns = min(8, len(both))
    lines = -(-len(both) // columns)
    figure = Figure(figsize=(2.6 * columns, 3.2 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes[len(both) :]:
        axis.set_axis_off()
    for axis, entry in zip(axes, both, strict=False):
        bars = axis.bar(["ours", entry["against"]], [entry["ours"], entry["peer"]], color=["#1c7ed6", "#adb5bd"])
        axis.bar_label(bars, fmt="%.0f", fontsize=9)
        axis.set_title(f"{entry['quantity']}\n{entry['setting']}", fontsize=8, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel(f"ratio {entry['ratio']}", fontsize=9)
    figure.savefig(path, dpi=130)
