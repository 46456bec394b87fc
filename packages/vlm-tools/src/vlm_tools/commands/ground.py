"""``vlm-tools ground``: where a model sees a phrase."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from vlm_tools.commands.files import written_file
from vlm_tools.commands.options import Device, Model, OutDir, Picture, ReadingName
from vlm_tools.models.session import open_session, read_picture
from vlm_tools.pictures.overlay import common_limits, overlay, strip
from vlm_tools.readings.explain import explain, on_picture, with_answer
from vlm_tools.readings.vl_sam import point_prompt


def ground(
    picture: Picture,
    phrase: Annotated[str, typer.Argument(help="What to look for; its last token asks.")],
    model: Model = None,
    reading: ReadingName = "attention",
    out: OutDir = Path("explanations"),
    device: Device = "auto",
) -> Iterator[str]:
    """Where the model sees a phrase: heat map, no-image control, point prompt."""
    shown = read_picture(picture)
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
    file = written_file(out, picture, phrase, reading)
    maps = [on_picture(values, boxes, size) for values in (heat, control)]
    limits = common_limits(heat, control)
    pictures = [
        overlay(shown, heat, name, limits=limits)
        for heat, name in zip(maps, (phrase, "without the image"), strict=True)
    ]
    strip(pictures).save(f"{file}.png")
    np.savez_compressed(f"{file}.npz", heat=heat, control=control, boxes=boxes, picture_size=size)
    prompt = point_prompt(maps[0])
    yield f"positive point {prompt.positive}, negative point {prompt.negative} (x, y in pixels)"
    yield f"wrote {file}.png, {file}.npz"
