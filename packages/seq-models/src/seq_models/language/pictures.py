"""Where in the rows a language model is right."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from seq_models.language.metrics import NATS_PER_BIT
from seq_models.language.task import LanguageTask


@torch.no_grad()
def draw_accuracy(model: LanguageTask, loader: Iterable[dict[str, Any]], path: Path) -> None:
    """Accuracy and loss by position, over the counted tokens of all rows."""
    sums: torch.Tensor | None = None
    for batch in loader:
        device = next(model.parameters()).device
        ids, target = batch["input_ids"].to(device), batch["labels"][:, 1:].to(device)
        logits = model.net(ids, use_cache=False).logits[:, :-1].float()
        bits = nn.functional.cross_entropy(logits.mT, target, reduction="none", ignore_index=-100) / NATS_PER_BIT
        counted = target != -100
        here = torch.stack([counted, (logits.argmax(-1) == target) & counted, bits]).sum(1).cpu()
        sums = here if sums is None else sums + here
    if sums is None:
        return
    count, hits, bits = sums
    some = (count > 0).nonzero().flatten()
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, values, title in zip(figure.subplots(1, 2), (hits, bits), ("accuracy", "bits per token"), strict=True):
        axes.plot(some.tolist(), (values[some] / count[some]).tolist(), marker=".", linewidth=0.8)
        axes.set_title(f"{title}: {float(values.sum() / count.sum()):.3f}", loc="left", fontsize=11)
        axes.set_xlabel("position")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
