"""``seq-models demo``: a Pointer Network's answers to fresh instances."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from seq_models.package import PACKAGE

INSTANCES = 12


def demo(
    run: Annotated[str | None, typer.Option(help="Run directory (default: the newest under runs).")] = None,
    out: Annotated[Path, typer.Option("--out", help="Picture to write.")] = Path("demo.png"),
    seed: Annotated[int, typer.Option(help="Of the points.", min=0, max=2**63 - 1)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<n>.")] = "auto",
) -> Iterator[str]:
    """Draw a trained Pointer Network's answers to twelve new instances, and how sure it is of them."""
    from attn_core.engine.run import open_run
    from seq_models.data.geometry import answers
    from seq_models.pointing.pictures import draw_instances
    from seq_models.pointing.task import PointingTask, trimmed

    trained = open_run(PACKAGE, run, device=device)
    model = trained.model
    if not isinstance(model, PointingTask):
        raise ValueError(f"demo: {trained.directory} holds no Pointer Network; generate continues a text")
    task, n = trained.data_info["task"], trained.data_info["n"]
    points = torch.rand(INSTANCES, n, 2, generator=torch.Generator().manual_seed(seed))
    truth = [trimmed(row) for row in answers(task, points).tolist()]
    found = model.net.decode(points.to(trained.device), constraint=model.constraint, beam=model.beam)
    given = [trimmed(row) for row in found.pointers.tolist()]
    for row, (answer, right) in enumerate(zip(given, truth, strict=True)):
        yield f"{row + 1:2d}: {' '.join(map(str, answer))} (truth {' '.join(map(str, right))})"
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_instances(out, task, points, given, truth, found.log_prob.exp().tolist())
    yield f"wrote {out}"
