"""``vlm-tools predict``: captions with maps, or masks of answers; and the picture at the end of a run."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from attn_core.engine import TrainedRun
from attn_core.engine.inputs import PredictionTable, find_inputs
from attn_core.pictures import ENDINGS

if TYPE_CHECKING:
    from vlm_tools.models.session import Session

LONGEST = 30  # tokens of a caption


def predict(run: TrainedRun, inputs: Sequence[Path], out: Path) -> Iterator[str]:
    """Caption of each picture as a line; ``<out>/<name>_caption.png`` shows where each word looks.

    Of a run of sentence blocks: the digits that are found, and ``<out>/<name>_answers.png``, where each is looked for.
    Folders are searched at any depth and mirrored; ``predictions.csv`` and ``.json`` list all captions.

    Raises:
        ValueError: a picture that cannot be read, a folder without pictures.
    """
    from vlm_tools.models.sentence_blocks import SentenceBlocks
    from vlm_tools.models.session import Session

    if isinstance(run.model.net, SentenceBlocks):  # pyright: ignore[reportAttributeAccessIssue]
        yield from _predict_answers(run, inputs, out)
        return
    session = Session(run.model.net, None)  # pyright: ignore[reportAttributeAccessIssue]
    with PredictionTable(out) as table:
        for item in find_inputs(inputs, ENDINGS, what="pictures", out=out):
            file = item.output(out, "_caption.png")
            caption = _drawn_caption(session, item.path, file)
            table.add(item, caption=caption, picture=str(file.relative_to(out)) if caption else None)
            yield f"{item.path}: {caption} → {file}" if caption else f"{item.path}: (nothing)"
    yield f"wrote {', '.join(map(str, table.files))}"


def _predict_answers(run: TrainedRun, inputs: Sequence[Path], out: Path) -> Iterator[str]:
    from vlm_tools.digits.grounding import answers, draw_answers
    from vlm_tools.models.session import read_picture

    task: Any = run.model
    with PredictionTable(out) as table:
        for item in find_inputs(inputs, ENDINGS, what="pictures", out=out):
            file = item.output(out, "_answers.png")
            shown = read_picture(item.path)
            probability = answers(task.net, shown)
            found = ", ".join(draw_answers(shown, probability, file, threshold=task.threshold))
            table.add(item, answers=found, picture=str(file.relative_to(out)))
            yield f"{item.path}: {found or '(nothing)'} → {file}"
    yield f"wrote {', '.join(map(str, table.files))}"


def _drawn_caption(session: "Session", path: Path, file: Path) -> str:
    """The caption of a picture; a strip of its words' maps is written unless it is empty."""
    from vlm_tools.data.digits_world import CAPTION_PROMPT
    from vlm_tools.models.session import read_picture
    from vlm_tools.pictures.overlay import overlay, shrunk, strip
    from vlm_tools.readings.explain import explain, on_picture, with_answer

    shown = read_picture(path)
    prompt = session.prepare(shown, CAPTION_PROMPT)
    answer = session.answer(prompt, LONGEST)
    whole = with_answer(prompt, answer)
    words = session.words(answer[0].tolist())
    kept = [number for number, word in enumerate(words) if word]
    if not kept:
        return ""
    first = prompt["input_ids"].shape[1]
    heat = explain(session.model, whole, [first - 1 + number for number in kept], reading="attention")
    boxes = session.boxes(whole, (shown.height, shown.width))
    small, limits = shrunk(shown), (0.0, max(float(heat.max()), 1e-6))
    pictures = [
        overlay(small, on_picture(values, boxes, (small.height, small.width)), words[number], limits=limits)
        for values, number in zip(heat, kept, strict=True)
    ]
    strip(pictures).save(file)
    return session.text(answer[0].tolist())


def draw_predictions(model: nn.Module, loader: Iterable[dict[str, Any]], path: Path) -> None:
    """Test scenes with the map of a digit's word over them, or with the answer's."""
    from vlm_tools.digits.demo import draw_scenes
    from vlm_tools.digits.grounding import GroundingTask, draw_grounded
    from vlm_tools.models.session import Session

    if isinstance(model, GroundingTask):
        draw_grounded(model, loader, path)
        return

    draw_scenes(Session(model.net, None), loader.dataset, path)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
