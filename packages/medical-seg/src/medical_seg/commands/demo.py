"""``demo``: train on the brain that nilearn carries, and compare with grouping intensities. A demonstration."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from medical_seg.package import PACKAGE

RECIPE = "agunet_icbm152"


def demo_of(out: Path, seed: int, steps: int | None, device: str) -> Iterator[str]:
    """Train, test, print both rows, write demo.json."""
    from attn_core.engine.train import TrainOptions, train
    from medical_seg.data.icbm152 import CLASSES, SPACING, TEST_BEGIN, TRAIN_END, load_icbm152, three_means
    from medical_seg.pictures.end_of_run import draw_predictions

    image, label = load_icbm152()
    held_out = slice(TEST_BEGIN, None)
    image, label = image[:, held_out], label[:, held_out]
    baseline = dice_of(three_means(image, label > 0), label)
    yield "one average brain, T1 at 2 mm; a demonstration, not a benchmark"
    yield f"trained on coronal planes 0 to {TRAIN_END - 1}, tested from {TEST_BEGIN} on"
    lines: list[str] = []
    options = TrainOptions(
        recipe=RECIPE, out=out, seed=seed, device=device, overrides=() if steps is None else (f"steps={steps}",)
    )
    result = train(PACKAGE, options, say=lines.append, draw=draw_predictions)
    yield from lines
    ours = [result.metrics[f"dice_{name}"] for name in CLASSES[1:]]
    yield f"{'':28}" + "".join(f"{name:>14}" for name in CLASSES[1:])
    yield f"{'AGUNet, finds the brain':28}" + "".join(f"{score:14.3f}" for score in ours)
    yield f"{'3-means, brain given':28}" + "".join(f"{score:14.3f}" for score in baseline)
    about = {"classes": CLASSES[1:], "dice": ours, "dice_three_means": baseline, "spacing_mm": SPACING, "seed": seed}
    (result.directory / "demo.json").write_text(json.dumps({**about, "seconds": result.seconds}, indent=1) + "\n")
    yield f"took {result.seconds:.0f} s; picture: {result.directory / 'predictions.png'}"


def dice_of(found: np.ndarray, label: np.ndarray) -> list[float]:
    """Dice of the classes 1, 2, 3."""
    return [
        float(2 * ((found == k) & (label == k)).sum() / max(1, (found == k).sum() + (label == k).sum()))
        for k in (1, 2, 3)
    ]


def demo(
    out: Annotated[Path, typer.Option("--out", help="Run directory.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Training steps (default: the recipe's).")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<n>.")] = "auto",
) -> Iterator[str]:
    """Train on an average brain without downloading anything: T1 → CSF, grey and white matter."""
    return demo_of(out, seed, steps, device)
