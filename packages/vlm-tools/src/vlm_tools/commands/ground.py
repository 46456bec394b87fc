"""``vlm-tools ground``: where a model sees a phrase."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from vlm_tools.commands.files import written_file
from vlm_tools.commands.options import Device, Model, OutDir, Picture, ReadingName, check_reading


def ground(
    picture: Picture,
    phrase: Annotated[str, typer.Argument(help="What to look for; its last token asks.")],
    model: Model = None,
    reading: ReadingName = "attention",
    out: OutDir = Path("explanations"),
    device: Device = "auto",
) -> Iterator[str]:
    """Where the model sees a phrase: heat map, no-image control, point prompt."""
    from vlm_tools.models.session import open_session, read_picture
    from vlm_tools.pictures.overlay import common_limits, overlay, shrunk, strip
    from vlm_tools.readings.explain import explain, on_picture, with_answer
    from vlm_tools.readings.verbalization import verbalize_regions
    from vlm_tools.readings.vl_sam import point_prompt

    shown = read_picture(picture)
    check_reading(reading)
    session = open_session(model, device=device)
    tokens = torch.tensor([session.encode(phrase)], device=session.model.device)
    inputs = with_answer(session.prepare(shown, "describe the image ."), tokens)
    row = inputs["input_ids"].shape[1] - 1
    target = [int(inputs["input_ids"][0, -1])]
    row = row - (reading not in ("attention", "rollout", "flow"))
    size = (shown.height, shown.width)
    boxes = session.boxes(inputs, size)
    options: dict[str, Any] = {"reading": reading}
    heat = explain(session.model, inputs, [row], target, **options)[0].float().cpu()
    control = explain(session.model, inputs, [row], target, control=True, **options)[0].float().cpu()
    prompt = point_prompt(on_picture(heat, boxes, size))
    file = written_file(out, picture, phrase, reading)
    small, limits = shrunk(shown), common_limits(heat, control)
    pictures = [
        overlay(small, on_picture(values, boxes, (small.height, small.width)), name, limits=limits, side=460)
        for values, name in ((heat, phrase), (control, "without the image"))
    ]
    strip(pictures).save(f"{file}.png")
    np.savez_compressed(f"{file}.npz", heat=heat, control=control, boxes=boxes, picture_size=size)
    yield f"where: {verbalize_regions(on_picture(heat, boxes, size).numpy())}"
    yield f"positive point {prompt.positive}, negative point {prompt.negative} (x, y in pixels)"
    yield f"wrote {file}.png, {file}.npz"
