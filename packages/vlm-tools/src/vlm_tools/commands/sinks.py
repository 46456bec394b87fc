"""``vlm-tools sinks``: the sink dimensions of a model."""

from collections.abc import Iterator
from typing import Annotated

import typer

from vlm_tools.commands.options import Device, Model, Picture


def sinks(
    picture: Picture,
    model: Model = None,
    tau: Annotated[float, typer.Option(help="Least |x| / RMS(x) of a sink.")] = 20.0,
    prompt: Annotated[str, typer.Option(help="Prompt to run.")] = "describe the image .",
    device: Device = "auto",
) -> Iterator[str]:
    """Find the sink dimensions of a model, which VAR needs."""
    from vlm_tools.methods.sinks import find_sinks
    from vlm_tools.models.session import open_session, read_picture

    shown = read_picture(picture)
    session = open_session(model, device=device)
    found = find_sinks(session.model, session.prepare(shown, prompt), tau=tau)
    yield f"sink dimensions: {', '.join(map(str, found.dims))}"
    yield f"use them: VAR(dims={list(found.dims)}) or --method var --option 'dims={list(found.dims)}'"
