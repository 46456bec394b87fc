"""What the command line makes of a trained model: answers to files of points or bits per byte of files of text."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from attn_core.engine import TrainedRun

from .geometry_pictures import draw_answers, draw_instance
from .language_task import NATS_PER_BIT, LanguageTask
from .pointing_task import PointingTask, trimmed

POINT_SUFFIXES = (".csv", ".txt", ".npy")
WINDOW = 1024  # tokens that a file of text is scored in at a time


def predict(run: TrainedRun, inputs: Sequence[Path], out: Path) -> Iterator[str]:
    """Of each file of points (two columns; .csv, .txt, .npy) the answer and ``<out>/<name>.png``; of each file of text
    its bits per byte.

    Raises:
        ValueError: a file without points or text, with other columns, or with numbers that are not finite.
    """
    files = [file for path in inputs for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    for file in files:
        if isinstance(run.model, PointingTask):
            points = read_points(file)
            low, high = points.amin(0), points.amax(0)
            unit = (points - low) / (high - low).max().clamp_min(1e-12)  # the square that the network was trained on
            net: Any = run.model.net
            found = net.decode(unit[None].to(run.device), constraint=run.model.constraint, beam=run.model.beam)
            answer = trimmed(found.pointers[0].tolist())
            out.mkdir(parents=True, exist_ok=True)
            figure = Figure(figsize=(5, 5), layout="constrained")
            FigureCanvasAgg(figure)
            draw_instance(figure.subplots(), run.data_info["task"], points, answer, None)
            figure.savefig(picture := out / f"{file.stem}.png", dpi=120)
            yield f"{file}: {' '.join(map(str, answer))} (log p {float(found.log_prob):.3f}) → {picture}"
        else:
            bits, count = bits_per_byte(run, file.read_bytes(), str(file))
            yield f"{file}: {bits:.3f} bits per byte over {count:,} bytes"


def read_points(file: Path) -> torch.Tensor:
    """Points (N, 2) of a file.

    Raises:
        ValueError: as :func:`predict`.
    """
    try:
        if file.suffix == ".npy":
            table = np.load(file, allow_pickle=False)
        else:
            text = file.read_text(encoding="utf-8").replace(",", " ").replace(";", " ")
            table = np.array([[float(word) for word in line.split()] for line in text.splitlines() if line.split()])
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is not a table of numbers ({', '.join(POINT_SUFFIXES)}): {error}") from None
    if table.size == 0:
        raise ValueError(f"{file} holds no points")
    if table.ndim != 2 or table.shape[1] != 2 or not np.isfinite(table.astype(np.float64)).all():
        raise ValueError(f"{file} must hold two columns of finite numbers, x and y, got shape {table.shape}")
    return torch.from_numpy(table.astype(np.float32))


def bits_per_byte(run: TrainedRun, text: bytes, what: str) -> tuple[float, int]:
    """Mean −log₂ p of every byte but the first, the state carried along the text.

    Raises:
        ValueError: fewer than two bytes.
    """
    if len(text) < 2:
        raise ValueError(f"{what} holds {len(text)} bytes of text, needs at least 2")
    net: Any = run.model.net
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().to(run.device)
    state, nats = None, 0.0
    for start in range(0, len(tokens) - 1, WINDOW):
        piece = tokens[None, start : min(start + WINDOW, len(tokens) - 1)]
        output = net(piece, past_key_values=state, use_cache=True)
        state = output.past_key_values
        target = tokens[start + 1 : start + 1 + piece.shape[1]]
        nats += float(nn.functional.cross_entropy(output.logits[0].float(), target, reduction="sum"))
    return nats / (len(tokens) - 1) / NATS_PER_BIT, len(tokens) - 1


def draw_predictions(model: nn.Module, loader: Iterable[dict[str, Any]], path: Path) -> None:
    """Answers of a Pointer Network beside the truth; of a language model, where in the rows it is right.

    See :func:`draw_answers` and :func:`draw_accuracy`.
    """
    if isinstance(model, PointingTask):
        draw_answers(model, loader, path, loader.dataset.metainfo["task"])  # pyright: ignore
    elif isinstance(model, LanguageTask):
        draw_accuracy(model, loader, path)


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
