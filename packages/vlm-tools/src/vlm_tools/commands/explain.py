"""``vlm-tools explain``: where each word of an answer looks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from vlm_tools.commands.files import written_file
from vlm_tools.commands.options import (
    Device,
    MethodName,
    Model,
    Options,
    OutDir,
    Picture,
    ReadingName,
    Tokens,
    check_reading,
    chosen_method,
    under,
)


def explain_answer(
    picture: Picture,
    prompt: Annotated[str, typer.Argument(help="Question or instruction.")] = "describe the image .",
    model: Model = None,
    reading: ReadingName = "attention",
    method: MethodName = None,
    option: Options = None,
    out: OutDir = Path("explanations"),
    tokens: Tokens = 32,
    device: Device = "auto",
) -> Iterator[str]:
    """Where each word of an answer looks: a strip of pictures, raw maps, and a page to explore."""
    from vlm_tools.models.session import open_session, read_picture
    from vlm_tools.pictures.overlay import common_limits, overlay, shrunk, strip
    from vlm_tools.pictures.page import write_page
    from vlm_tools.readings.explain import explain, on_picture, record, with_answer

    shown, chosen = read_picture(picture), chosen_method(method, option)
    check_reading(reading)
    session = open_session(model, device=device)
    inputs = session.prepare(shown, prompt)
    with under(session, chosen):
        answer = session.answer(inputs, tokens)
    words = session.words(answer[0].tolist())
    yield f"answer: {session.text(answer[0].tolist())}"
    kept = [number for number, word in enumerate(words) if word.strip()]
    if not kept:
        raise ValueError("the answer has no word that could be explained; ask something else")
    whole = with_answer(inputs, answer)
    first = inputs["input_ids"].shape[1]
    rows = [first - 1 + number for number in range(answer.shape[1])]
    options: dict[str, Any] = {"reading": reading}
    heat = explain(session.model, whole, rows, answer[0].tolist(), **options).float().cpu()
    control = explain(session.model, whole, rows, answer[0].tolist(), control=True, **options).float().cpu()
    boxes = session.boxes(whole, (shown.height, shown.width))
    file = written_file(out, picture, prompt, reading)
    limits = common_limits(heat)
    small = shrunk(shown)
    size = (small.height, small.width)
    pictures = [overlay(small, on_picture(heat[n], boxes, size), words[n], limits=limits) for n in kept]
    strip(pictures).save(f"{file}.png")
    np.savez_compressed(f"{file}.npz", heat=heat, control=control, boxes=boxes, words=np.array(words))
    recorder = record(session.model, whole)
    visual = recorder.visual
    assert visual is not None
    maps = torch.stack([torch.stack([r.row(row)[:, visual] for r in recorder.records.values()]) for row in rows])
    page = write_page(shown, prompt, [words[n] for n in kept], maps[kept].float().cpu(), boxes)
    Path(f"{file}.html").write_text(page, encoding="utf-8")
    difference = float((heat - control).abs().mean() / heat.abs().mean().clamp_min(1e-12))
    yield f"difference from the no-image control: {100 * difference:.0f} % of the mean relevance"
    yield f"wrote {file}.png, {file}.npz, {file}.html"
