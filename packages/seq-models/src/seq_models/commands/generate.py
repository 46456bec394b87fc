"""``seq-models generate``: continue a text."""

from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer

from attn_core.engine.run import open_run
from seq_models.language.language_model import CausalLM
from seq_models.package import PACKAGE


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    run: Annotated[str | None, typer.Option(help="Run directory (default: the newest under runs).")] = None,
    length: Annotated[int, typer.Option(help="Bytes to write.", min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable byte.", min=0.0)] = 0.8,
    beams: Annotated[int, typer.Option(help="Beams of beam search.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<n>.")] = "auto",
) -> Iterator[str]:
    """Continue a text with a trained language model of bytes."""
    tokens = list(prompt.encode())
    if not tokens:
        raise ValueError("generate: the prompt is empty; give at least one character")
    trained = open_run(PACKAGE, run, device=device)
    net: Any = trained.model.net
    if not isinstance(net, CausalLM) or net.config.vocab_size < 256:
        raise ValueError(f"generate: {trained.directory} holds no language model of bytes")
    torch.manual_seed(seed)
    sampled = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    out = net.generate(torch.tensor([tokens], device=trained.device), max_new_tokens=length, num_beams=beams, **sampled)  # pyright: ignore[reportAttributeAccessIssue]
    yield bytes(token for token in out[0].tolist() if token < 256).decode(errors="replace")
