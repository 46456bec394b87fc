"""``vlm-tools ask``: a question about a picture, answered with and without a method."""

from collections.abc import Iterator
from typing import Annotated

import typer

from vlm_tools.commands.options import Device, MethodName, Model, Options, Picture, Tokens, chosen_method


def ask(
    picture: Picture,
    question: Annotated[str, typer.Argument(help="What to ask.")],
    model: Model = None,
    method: MethodName = None,
    option: Options = None,
    tokens: Tokens = 64,
    device: Device = "auto",
) -> Iterator[str]:
    """Answer a question about a picture, with and without a method."""
    from vlm_tools.intervention.hooking import intervene
    from vlm_tools.models.session import open_session, read_picture

    chosen, shown = chosen_method(method, option), read_picture(picture)
    session = open_session(model, device=device)
    inputs = session.prepare(shown, question)
    yield f"answer: {session.text(session.answer(inputs, tokens)[0].tolist())}"
    if chosen is not None:
        with intervene(session.model, chosen) as run:
            yield f"with {chosen.name}: {session.text(session.answer(inputs, tokens)[0].tolist())}"
        edited = sum(int(row["edited"]) for row in run.report())
        if chosen.changes_attention:
            yield f"{edited:,} of {sum(int(row['rows']) for row in run.report()):,} rows of heads were changed"
