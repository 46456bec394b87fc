"""``vlm-tools caption``: a description of a picture, with and without a method."""

from collections.abc import Iterator
from typing import Annotated

import typer

from vlm_tools.commands.ask import ask
from vlm_tools.commands.options import Device, MethodName, Model, Options, Picture, Tokens


def caption(
    picture: Picture,
    prompt: Annotated[str | None, typer.Option(help="Instruction (default: describe the image).")] = None,
    model: Model = None,
    method: MethodName = None,
    option: Options = None,
    tokens: Tokens = 64,
    device: Device = "auto",
) -> Iterator[str]:
    """Describe a picture, with and without a method."""
    return ask(picture, "describe the image ." if prompt is None else prompt, model, method, option, tokens, device)
