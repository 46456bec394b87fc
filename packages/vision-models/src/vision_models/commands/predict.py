"""The verb ``predict``: the best classes of pictures, with pictures of what the network attends to."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from attn_core.engine import TrainedRun
from attn_core.engine.inputs import PredictionTable, find_inputs


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
    """Top-5 of each picture as a line and in ``predictions.csv`` and ``.json``; folders are searched at any depth.

    ``<out>/<folders>/<name>_<family>.png`` shows what the token or region at a point reads.

    Args:
        explain: draw that picture, for families that have one (``vision_models.pictures.explain``).
        region: the point, as fractions of the picture's height and width.

    Raises:
        ValueError: a point outside [0, 1]; a picture that cannot be read, a folder without pictures, a run without a
            known preprocessing, or one that classifies nothing.
    """
    from attn_core.pictures import ENDINGS
    from vision_models.data.images import preparation
    from vision_models.localization.task import LocalizationTask
    from vision_models.pictures.explain import draw, panels_of
    from vision_models.tasks.denoising import DenoisingTask

    if not all(0 <= fraction <= 1 for fraction in region):
        raise ValueError(f"--region must be two fractions of height and width such as 0.5 0.5, got {region}")
    if isinstance(run.model, DenoisingTask):
        raise ValueError(
            f"predict: {run.directory} makes pictures and classifies none; its samples are in predictions.png"
        )
    preprocess, classes = preparation(run.data_info, run.directory)
    net: Any = run.model.net  # pyright: ignore[reportAttributeAccessIssue]
    if net.num_classes != len(classes):
        raise ValueError(
            f"{run.directory / 'run.json'} names {len(classes)} classes, the network has {net.num_classes}"
        )
    found = find_inputs(inputs, ENDINGS, what="pictures", out=out)
    with PredictionTable(out) as table:
        for item in found:
            image, tensor = preprocess.read(item.path)
            tensor = tensor.to(run.device)
            probabilities = net(tensor[None])[0].float().softmax(-1).cpu()
            best = probabilities.topk(min(5, len(classes)))
            scores = [(classes[i], float(p)) for p, i in zip(best.values, best.indices.tolist(), strict=True)]
            boxed: dict[str, Any] = {}
            picture: Path | None = None
            if isinstance(run.model, LocalizationTask):
                title = f"{scores[0][0]}  {100 * scores[0][1]:.1f} %"
                boxed["box"], picture = _located(run, tensor, int(best.indices[0]), title, item.output(out, "_map.png"))
            table.add(item, label=scores[0][0], probability=scores[0][1], best=dict(scores), **boxed)
            line = f"{item.path}: " + ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in scores)
            if boxed:
                line += f" at {boxed['box']} → {picture}"
            elif explain and panels_of(net) is not None:
                picture = item.output(out, f"_{type(net).__name__.lower()}.png")
                draw(net, tensor, image, scores, region, picture)
                line += f" → {picture}"
            yield line
    yield "wrote " + " and ".join(map(str, table.files))


def _located(run: TrainedRun, image: Any, label: int, title: str, picture: Path) -> tuple[tuple[int, ...], Path]:
    """The box of the object, in pixels of what the network sees, and the picture drawn of it."""
    import torch

    from vision_models.pictures.localization import draw

    model: Any = run.model
    found = model.predict(image=image[None], label=torch.tensor([label], device=image.device))[0]["map"]
    info: Any = run.data_info
    return draw(image, info["preprocess"], found, title, picture), picture
