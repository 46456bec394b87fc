"""What the command line makes of a trained classifier: top-5 with pictures of attention, and the end-of-run grid."""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from attn_core.engine import TrainedRun

from .data.imagefolder import SUFFIXES
from .data.images import Preprocess
from .explain import draw, panels_of


def predict(
    run: TrainedRun,
    inputs: Sequence[Path],
    out: Path,
    *,
    explain: Annotated[bool, typer.Option(help="Draw what the network attends to, as <name>_<family>.png.")] = True,
    region: Annotated[
        tuple[float, float], typer.Option(metavar="Y X", help="Point whose token or region the picture follows.")
    ] = (0.5, 0.5),
) -> Iterator[str]:
    """Top-5 of each picture as a line; ``<out>/<name>_<family>.png`` shows what the token or region at a point reads.

    Args:
        explain: draw that picture, for families that have one (``vision_models.explain``).
        region: the point, as fractions of the picture's height and width.

    Raises:
        ValueError: a point outside [0, 1]; a picture that cannot be read, a folder without pictures, a run without a
            known preprocessing.
    """
    if not all(0 <= fraction <= 1 for fraction in region):
        raise ValueError(f"--region must be two fractions of height and width such as 0.5 0.5, got {region}")
    options = run.data_info.get("preprocess")
    if options is None:
        raise ValueError(f"{run.directory}: its data set says nothing about preprocessing (metainfo['preprocess'])")
    preprocess = Preprocess(**options)
    classes = run.data_info["classes"]
    net: Any = run.model.net  # pyright: ignore[reportAttributeAccessIssue]
    out.mkdir(parents=True, exist_ok=True)
    for path in _pictures(inputs):
        image, tensor = preprocess.read(path)
        tensor = tensor.to(run.device)
        probabilities = net(tensor[None])[0].float().softmax(-1).cpu()
        best = probabilities.topk(min(5, len(classes)))
        scores = [(classes[i], float(p)) for p, i in zip(best.values, best.indices.tolist(), strict=True)]
        line = f"{path}: " + ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in scores)
        if explain and panels_of(net) is not None:
            picture = out / f"{path.stem}_{type(net).__name__.lower()}.png"
            draw(net, tensor, image, scores, region, picture)
            line += f" → {picture}"
        yield line


def _pictures(inputs: Sequence[Path]) -> Iterator[Path]:
    for path in inputs:
        if not path.is_dir():
            yield path
            continue
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not found:
            raise ValueError(f"{path} holds no pictures ({', '.join(sorted(SUFFIXES))})")
        yield from found


@torch.no_grad()
def draw_predictions(model: nn.Module, loader: Iterable[dict[str, Any]], path: Path) -> None:
    """A grid of 40 test images: every error first (framed), then the least certain, then whatever comes.

    Above each image stands what the model says and how sure it is, in an error also what is true.
    """
    info = loader.dataset.metainfo  # pyright: ignore[reportAttributeAccessIssue]
    classes, options = info["classes"], info["preprocess"]
    mean = torch.tensor(options.get("mean", (0.485, 0.456, 0.406))).view(-1, 1, 1)
    std = torch.tensor(options.get("std", (0.229, 0.224, 0.225))).view(-1, 1, 1)
    kept: list[tuple[float, int, Any]] = []  # the 40 least convincing, without keeping a whole test set
    errors = total = 0
    for batch in loader:
        device = next(model.parameters()).device
        results = model.predict(**{key: value.to(device) for key, value in batch.items()})  # pyright: ignore
        for image, result in zip(batch["image"], results, strict=True):
            probability, guess = result["scores"].max(0)
            wrong = int(guess) != result["label"]
            errors, total = errors + wrong, total + 1
            entry = (wrong + 1 - float(probability), -total, (image, int(guess), float(probability), result["label"]))
            (heapq.heappush if len(kept) < 40 else heapq.heappushpop)(kept, entry)
    kept.sort(reverse=True)
    columns = 10
    rows = max(1, -(-len(kept) // columns))
    figure = Figure(figsize=(1.25 * columns, 1.5 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{errors} of {total} test images wrong ({100 * (1 - errors / max(total, 1)):.2f} % right); "
        f"shown: the {len(kept)} least certain, errors framed",
        fontsize=11,
        x=0.01,
        ha="left",
    )
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in grid:
        axis.set_axis_off()
    for axis, (_, _, (image, guess, probability, label)) in zip(grid, kept, strict=False):
        pixels = (image.cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).squeeze(-1).numpy()
        axis.imshow(pixels, cmap="gray", vmin=0, vmax=1)
        axis.set_axis_on()
        axis.set_xticks([])
        axis.set_yticks([])
        wrong = guess != label
        text = f"{classes[guess][:14]}  {100 * probability:.0f} %" + (f"\ntrue: {classes[label][:14]}" if wrong else "")
        axis.set_title(text, fontsize=8, color="#c92a2a" if wrong else "#2b8a3e")
        axis.spines[:].set(color="#c92a2a" if wrong else "#ced4da", linewidth=3 if wrong else 0.8)
    figure.savefig(path, dpi=130)
