"""What every benchmark of this package measures with: times in turns, peak memory, one row for each quantity."""

import platform
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attn_core.bench import in_turns
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
    setting = _setting(name, x) + (", torch.compile" if compiled else "")
    rows = [row(setting, label, "forward, ms", times(forward, models, x), error)]
    if compiled:
        return rows
    peaks = {side: peak(lambda model=model: forward(model, x), device) for side, model in models.items()}
    rows.append(row(setting, label, "forward, peak MiB", peaks, error))
    for model in models.values():
        model.train()
    rows.append(row(setting, label, "training step, ms", times(step, models, x), error))
    peaks = {side: peak(lambda model=model: step(model, x), device) for side, model in models.items()}
    rows.append(row(setting, label, "training step, peak MiB", peaks, error))
    for model in models.values():
        model.eval()
    return rows


class Layers(nn.Module):
    """Layers that a network calls, each with what it got there; ``forward`` calls them one after another.

    Args:
        net: in the mode to be measured. x: its batch.
        kind: class, or classes, of the layers.
        replace: what to call, with the first input alone, in the place of each; default: the layer itself.
    """

    def __init__(
        self,
        net: nn.Module,
        kind: type[nn.Module] | tuple[type[nn.Module], ...],
        x: Tensor,
        *,
        replace: Callable[[Any], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.inputs: list[tuple[Any, ...]] = []
        self.layers: list[nn.Module] = []
        hooks = [layer.register_forward_pre_hook(self._record) for layer in net.modules() if isinstance(layer, kind)]
        with torch.no_grad():
            net(x)
        for hook in hooks:
            hook.remove()
        if replace is not None:
            self.layers = [replace(layer) for layer in self.layers]
            self.inputs = [given[:1] for given in self.inputs]
        self.registered = nn.ModuleList(self.layers)

    def _record(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self.layers.append(layer)
        x = args[0].detach().clone(memory_format=torch.preserve_format).requires_grad_()
        self.inputs.append((x, *args[1:]))

    def forward(self, _: Tensor) -> Tensor:
        """The mean of each layer's output, (layers,); the argument is there for the callers' sake only."""
        results = [layer(*given).mean() for layer, given in zip(self.layers, self.inputs, strict=True)]
        return torch.stack(results)


def linear_row(name: str, ours: nn.Module, x: Tensor) -> dict[str, Any]:
    """What of a forward pass the linear layers take by themselves, which attention cannot lower."""

    def plain(layer: nn.Linear) -> nn.Module:
        other = nn.Linear(1, 1, bias=layer.bias is not None, device="meta")
        other.weight, other.bias = layer.weight, layer.bias  # pyright: ignore[reportAttributeAccessIssue]
        return other

    sides = {"ours": Layers(ours, nn.Linear, x), "peer": Layers(ours, nn.Linear, x, replace=plain)}
    return row(_setting(name, x), "nn.Linear", "of it linear layers, ms", times(forward, sides, x), 0.0)


def layer_rows(name: str, what: str, label: str, sides: dict[str, Layers], x: Tensor) -> list[dict[str, Any]]:
    """Layers by themselves: forward pass and training step."""
    return [
        row(_setting(name, x), label, f"{what} alone, {kind}, ms", times(call, sides, x), 0.0)
        for kind, call in (("forward", forward), ("training step", step))
    ]


def forward(model: nn.Module, x: Tensor) -> None:
    """One forward pass without gradients."""
    with torch.no_grad():
        model(x)


def step(model: nn.Module, x: Tensor) -> None:
    """One training step without the optimizer: forward, backward, gradients dropped."""
    model(x).square().mean().backward()
    model.zero_grad(set_to_none=True)


def _setting(name: str, x: Tensor) -> str:
    return f"{name}, batch {len(x)}, {x.shape[2]}²"


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


def times(call: Callable[[Any, Tensor], None], models: Mapping[str, nn.Module], x: Tensor) -> dict[str, float]:
    """Median milliseconds; the sides take turns, so that a busy machine hurts both."""
    calls = {side: lambda model=model: call(model, x) for side, model in models.items()}
    return {side: found.ms for side, found in in_turns(calls, device=x.device, rounds=REPEATS).items()}


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
