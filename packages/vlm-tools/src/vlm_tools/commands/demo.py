"""``vlm-tools demo``: a model that hallucinates, every method on held-out scenes, and a report."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_tools.commands.predict import draw_predictions
from vlm_tools.package import PACKAGE


def demo(
    run: Annotated[Path, typer.Option(help="Run of llava_digits; trained here if there is none.")] = Path(
        "runs/llava_digits"
    ),
    out: Annotated[Path, typer.Option("--out", help="Where the report is written.")] = Path("demo"),
    scenes: Annotated[int, typer.Option(help="Held-out scenes.", min=10, max=5000)] = 200,
    seed: Annotated[int, typer.Option(help="Of the training, if there is one.")] = 0,
) -> Iterator[str]:
    """Train the digits-world model if needed, test every method on held-out scenes, write a report."""
    from attn_core.engine.run import open_run
    from attn_core.engine.train import TrainOptions, train
    from vlm_tools.data.digits_world import EvaluationScenes
    from vlm_tools.digits.demo import HELD_OUT, compare, draw_scenes, report
    from vlm_tools.models.session import Session

    if not (run / "result.json").is_file():
        yield f"training the digits-world model in {run} (minutes)"
        lines: list[str] = []
        began = time.perf_counter()
        resume = (run / "config.py").is_file()
        options = TrainOptions(out=run, resume=resume, seed=None if resume else seed, device="cpu")
        train(PACKAGE, options, say=lines.append, draw=draw_predictions)
        yield f"trained in {time.perf_counter() - began:.0f} s"
    trained: Any = open_run(PACKAGE, run, device="cpu").model
    session = Session(trained.net.eval(), None)
    data = EvaluationScenes("test", scenes, start=HELD_OUT)
    rows = []
    for row in compare(session.model, data):
        rows.append(row)
        if "note" in row:
            yield f"{row['method']}: cannot work here: {row['note']}"
            continue
        yield (
            f"{row['method']}: random {row['random']:.3f}, adversarial {row['adversarial']:.3f}, "
            f"CHAIR_s {row['chair_s']:.3f}, recall {row['recall']:.3f}"
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.json").write_text(json.dumps({"scenes": scenes, "run": str(run), "rows": rows}, indent=1) + "\n")
    pointing = draw_scenes(session, data, out / "scenes.png")
    yield f"pointing game: the brightest cell of a digit's word is its own in {100 * pointing:.0f} % (chance 6 %)"
    (out / "report.html").write_text(report(rows, scenes, pointing), encoding="utf-8")
    yield f"wrote {out / 'report.html'}, {out / 'demo.json'}, {out / 'scenes.png'}"
