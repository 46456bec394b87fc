"""``seq-models generate``: continue a text."""

import math
from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer

from seq_models.package import PACKAGE


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    run: Annotated[str | None, typer.Option(help="Run directory (default: the newest under runs).")] = None,
    length: Annotated[int, typer.Option(help="Bytes, or tokens of the run's tokenizer, to write.", min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable one.", min=0.0)] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw among so many most probable ones.", min=1)] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among the most probable ones of this mass, up to 1.", min=0.0, max=1.0)
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: what stands there already becomes less probable.", min=0.01)
    ] = None,
    beams: Annotated[int, typer.Option(help="Beams of beam search.", min=1)] = 1,
    samples: Annotated[int, typer.Option(help="Continuations to write.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of the sampling.", min=0, max=2**63 - 1)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<n>.")] = "auto",
) -> Iterator[str]:
    """Continue a text with a trained language model, until its length or the end of the text."""
    from attn_core.engine.run import open_run
    from seq_models.language.scoring import language_model_of, text_codec_of

    if not prompt:
        raise ValueError("generate: the prompt is empty; give at least one character")
    settings: dict[str, Any] = {"top_k": top_k or 0, "top_p": top_p, "temperature": temperature}
    for name, value in (("temperature", temperature), ("top-p", top_p), ("repetition-penalty", repetition_penalty)):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"generate: --{name} must be finite, got {value}")
    if not temperature:
        if top_k is not None or top_p is not None:
            raise ValueError("generate: --top-k and --top-p choose what is drawn; nothing is with --temperature 0")
        settings = {}
    if samples > 1 and not settings and samples > beams:
        raise ValueError(f"generate: --samples {samples} with --temperature 0 needs as many --beams, got {beams}")
    if repetition_penalty is not None:
        settings["repetition_penalty"] = repetition_penalty
    trained = open_run(PACKAGE, run, device=device)
    net, codec = language_model_of(trained), text_codec_of(trained)
    torch.manual_seed(seed)
    ids = torch.tensor([codec.encode(prompt)], device=trained.device)
    out = net.generate(
        ids,
        max_new_tokens=length,
        num_beams=beams,
        num_return_sequences=samples,
        do_sample=bool(temperature),
        eos_token_id=codec.end,
        pad_token_id=codec.end,
        **{name: value for name, value in settings.items() if value is not None},
    )
    for number, row in enumerate(out.tolist()):
        if number:
            yield "---"
        yield codec.decode(row)
