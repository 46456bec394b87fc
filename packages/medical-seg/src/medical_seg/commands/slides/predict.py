"""``slides predict``: classes of slides, and the patches that decided most."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from attn_core.engine import TrainedRun
from attn_core.engine.inputs import PredictionTable


def predict(
    run: TrainedRun,
    inputs: Sequence[Path],
    out: Path,
    *,
    top: Annotated[int, typer.Option(help="Most attended patches to list.", min=0)] = 5,
) -> Iterator[str]:
    """A line and a row of ``predictions.csv`` and ``.json`` for each slide; it is read in pieces.

    Raises:
        ValueError: an input that cannot be used, or features of another encoder than the run's.
    """
    from medical_seg.slides.folder import find_slides
    from medical_seg.slides.reading import read_slide, task_of

    task = task_of(run)
    classes = run.data_info["classes"]
    slides = find_slides(inputs, out)
    with PredictionTable(out) as table:
        for slide in slides:
            found = read_slide(task, slide, run.device)
            first = found.importance.argsort(descending=True)[:top].tolist()
            places = slide.coordinates()
            columns: dict[str, Any] = {f"p({name})": p for name, p in zip(classes, found.scores.tolist(), strict=True)}
            columns["most attended"] = first if places is None else places[first].tolist()
            best = int(found.scores.argmax())
            table.add(slide.path, slide=slide.name, instances=slide.instances, label=classes[best], **columns)
            sure = 100 * float(found.scores[best])
            yield f"{slide.name}: {classes[best]} ({sure:.1f} %), {slide.instances} instances"
    yield f"wrote {', '.join(file.name for file in table.files)} to {out}"
