"""The command ``seq-models``: train, eval, predict, export, benchmark, list, info, generate, demo."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from attn_core.engine import ExportTarget, TaskPackage, TrainedRun
from attn_core.engine.cli import run_cli
from attn_core.engine.run import open_run

from .bench.causal import benchmark_causal
from .geometry_pictures import draw_instance
from .language_model import CausalLM
from .models import card, create_model, list_models
from .package import PACKAGE
from .pointer_network import PointerNetwork
from .predictions import draw_predictions, predict


def info(name: str) -> Mapping[str, object]:
    """Rows of a table about a registered model."""
    about = card(name)
    with torch.device("meta"):
        model = create_model(name)
    return {
        "model": name,
        "system": about.family,
        "what": about.summary,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "paper": about.paper,
        "official code": f"{about.code} ({about.license})" if about.code else "none released",
        "checked in": f"tests/{about.test}",
    }


class _Scores(nn.Module):
    """A model as a function of tensors to tensors, for other runtimes."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        if isinstance(self.net, CausalLM):
            return self.net(first, use_cache=False).logits
        return self.net(first, *others)


def export_target(run: TrainedRun | str) -> ExportTarget:
    """Logits of a language model as a function of its tokens.

    Raises:
        ValueError: a Pointer Network: its answer is a search, not a graph.
    """
    torch.manual_seed(0)
    net: Any = create_model(run).eval() if isinstance(run, str) else run.model.net
    net.requires_grad_(False)  # torch's counter of operations looks for gradients even where none are taken
    name = run if isinstance(run, str) else run.directory.name
    if isinstance(net, PointerNetwork):
        raise ValueError(f"{name} is a Pointer Network, whose answer is a search; export offers language models")
    return ExportTarget(_Scores(net), (torch.randint(net.config.vocab_size, (2, 32)),), name)


_Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<n>.")]


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    run: Annotated[str | None, typer.Option(help="Run directory (default: the newest under runs).")] = None,
    length: Annotated[int, typer.Option(help="Bytes to write.", min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable byte.", min=0.0)] = 0.8,
    beams: Annotated[int, typer.Option(help="Beams of beam search.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: _Device = "auto",
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


def demo(
    run: Annotated[str | None, typer.Option(help="Run directory (default: the newest under runs).")] = None,
    out: Annotated[Path, typer.Option("--out", help="Picture to write.")] = Path("demo.png"),
    seed: Annotated[int, typer.Option(help="Of the points.")] = 0,
    device: _Device = "auto",
) -> Iterator[str]:
    """Draw a trained Pointer Network's answers to twelve new instances, and how sure it is of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from .data.geometry import answers
    from .pointing_task import PointingTask, trimmed

    trained = open_run(PACKAGE, run, device=device)
    model = trained.model
    if not isinstance(model, PointingTask):
        raise ValueError(f"demo: {trained.directory} holds no Pointer Network; generate continues a text")
    task, n = trained.data_info["task"], trained.data_info["n"]
    points = torch.rand(12, n, 2, generator=torch.Generator().manual_seed(seed))
    truth = answers(task, points)
    found = model.net.decode(points.to(trained.device), constraint=model.constraint, beam=model.beam)
    figure = Figure(figsize=(12, 9.6), layout="constrained")
    FigureCanvasAgg(figure)
    for row, axes in enumerate(figure.subplots(3, 4).ravel()):
        answer, right = trimmed(found.pointers[row].tolist()), trimmed(truth[row].tolist())
        draw_instance(axes, task, points[row], answer, right)
        axes.set_title(f"p = {float(found.log_prob[row].exp()):.3f}", fontsize=9)
        yield f"{row + 1:2d}: {' '.join(map(str, answer))} (truth {' '.join(map(str, right))})"
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    yield f"wrote {out}"


CLI = TaskPackage(
    package=PACKAGE,
    summary="Attention models for sequences.",
    list_models=list_models,
    info=info,
    predict=predict,
    export=export_target,
    benchmark=benchmark_causal,
    draw_predictions=draw_predictions,
    commands={"generate": generate, "demo": demo},
)


def main() -> None:
    """Entry point of the command."""
    run_cli(CLI)
