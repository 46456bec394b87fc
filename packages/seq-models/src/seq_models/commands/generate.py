"""``seq-models generate``: continue a text."""

import math
from collections.abc import Iterator
from typing import Annotated

import torch
import typer

from seq_models.package import PACKAGE


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    run: Annotated[str | None, typer.Option(help="Run directory (default: the newest under runs).")] = None,
    length: Annotated[int, typer.Option(help="Bytes to write.", min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable byte.", min=0.0)] = 0.8,
    beams: Annotated[int, typer.Option(help="Beams of beam search.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of the sampling.", min=0, max=2**63 - 1)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<n>.")] = "auto",
) -> Iterator[str]:
    """Continue a text with a trained language model of bytes."""
    from attn_core.engine.run import open_run
    from seq_models.language.scoring import language_model_of

    tokens = list(prompt.encode(errors="surrogateescape"))  # what is no UTF-8 stays as it is
    if not tokens:
        raise ValueError("generate: the prompt is empty; give at least one character")
    if not math.isfinite(temperature):
        raise ValueError(f"generate: --temperature must be finite, got {temperature}")
    trained = open_run(PACKAGE, run, device=device)
    net = language_model_of(trained)
    torch.manual_seed(seed)
    settings: dict[str, float] = {"temperature": temperature} if temperature else {}
    ids = torch.tensor([tokens], device=trained.device)
    out = net.generate(ids, max_new_tokens=length, num_beams=beams, do_sample=bool(settings), **settings)
    yield bytes(token for token in out[0].tolist() if token < 256).decode(errors="replace")
