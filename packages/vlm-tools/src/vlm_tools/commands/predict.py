"""What the shared verbs make of a trained run: captions with maps, and the end-of-run picture."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from attn_core.engine import TrainedRun
from vlm_tools.data.digits_world import CAPTION_PROMPT
from vlm_tools.digits.demo import draw_scenes
from vlm_tools.models.session import Session, read_picture
from vlm_tools.pictures.overlay import overlay, strip
from vlm_tools.readings.explain import explain, on_picture, with_answer

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


def predict(run: TrainedRun, inputs: Sequence[Path], out: Path) -> Iterator[str]:
    """Caption of each picture as a line; ``<out>/<name>_caption.png`` shows where each word looks.

    Raises:
        ValueError: a picture that cannot be read, a folder without pictures.
    """
    session = Session(run.model.net, None)  # pyright: ignore[reportAttributeAccessIssue]
    out.mkdir(parents=True, exist_ok=True)
    for path in _pictures(inputs):
        shown = read_picture(path)
        prompt = session.prepare(shown, CAPTION_PROMPT)
        answer = session.answer(prompt, 30)
        whole = with_answer(prompt, answer)
        words = session.words(answer[0].tolist())
        kept = [number for number, word in enumerate(words) if word]
        if not kept:
            yield f"{path}: (nothing)"
            continue
        first, size = prompt["input_ids"].shape[1], (shown.height, shown.width)
        heat = explain(session.model, whole, [first - 1 + number for number in kept], reading="attention")
        boxes = session.boxes(whole, size)
        limits = (0.0, max(float(heat.max()), 1e-6))
        pictures = [
            overlay(shown, on_picture(values, boxes, size), words[number], limits=limits)
            for values, number in zip(heat, kept, strict=True)
        ]
        picture = out / f"{path.stem}_caption.png"
        strip(pictures).save(picture)
        yield f"{path}: {session.text(answer[0].tolist())} → {picture}"


def draw_predictions(model: nn.Module, loader: Iterable[dict[str, Any]], path: Path) -> None:
    """Test scenes with the map of a digit's word over them."""
    draw_scenes(Session(model.net, None), loader.dataset, path)  # pyright: ignore


def _pictures(inputs: Sequence[Path]) -> Iterator[Path]:
    for path in inputs:
        if not path.is_dir():
            yield path
            continue
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not found:
            raise ValueError(f"{path} holds no pictures ({', '.join(sorted(SUFFIXES))})")
        yield from found
