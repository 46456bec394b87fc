"""``vlm-tools demo``: a model that hallucinates, every method on held-out scenes, and a report."""

import html
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from vlm_tools.act import ACT
from vlm_tools.agla import AGLA
from vlm_tools.benchmarks.statistics import interval, mcnemar
from vlm_tools.data import DIGITS, EvaluationScenes
from vlm_tools.digits_evaluation import DigitsScores, answer_all, caption_all, scores_of
from vlm_tools.explain import explain, on_picture
from vlm_tools.intervention import intervene
from vlm_tools.logit_boost import LogitBoost
from vlm_tools.method import Identity, Method
from vlm_tools.overlay import overlay, strip
from vlm_tools.pai import PAI
from vlm_tools.paint import PAINT
from vlm_tools.session import Session
from vlm_tools.var import VAR
from vlm_tools.vcd import VCD

HELD_OUT = 1000  # first of the scenes that served no choice


def methods() -> dict[str, Method | None]:
    """What the demo compares, with published settings: none was chosen on these scenes. None is the model as it is."""
    return {
        "baseline": None,
        "identity (control)": Identity(),
        "logit boost 1": LogitBoost(1.0),
        "logit boost −2 (control)": LogitBoost(-2.0),
        "PAI 0.5": PAI(0.5, gamma=1.0),
        "PAI 0.5, guidance 1.1": PAI(0.5),
        "PAINT": PAINT(),
        "ACT": ACT(),
        "VAR": VAR(),
        "VCD 1": VCD(1.0),
        "AGLA, masked by color": AGLA(),
    }


def demo(
    run: Annotated[Path, typer.Option(help="Run of llava_digits; trained here if there is none.")] = Path(
        "runs/llava_digits"
    ),
    out: Annotated[Path, typer.Option("--out", help="Where the report is written.")] = Path("demo"),
    scenes: Annotated[int, typer.Option(help="Held-out scenes.", min=10)] = 200,
    seed: Annotated[int, typer.Option(help="Of the training, if there is one.")] = 0,
) -> Iterator[str]:
    """Train the digits-world model if needed, test every method on held-out scenes, write a report."""
    from attn_core.engine.run import TrainOptions, open_run, train

    from vlm_tools.cli import PACKAGE

    if not (run / "result.json").is_file():
        yield f"training the digits-world model in {run} (minutes)"
        lines: list[str] = []
        began = time.perf_counter()
        resume = (run / "config.py").is_file()
        options = TrainOptions(out=run, resume=resume, seed=None if resume else seed, device="cpu")
        train(PACKAGE, options, say=lines.append)
        yield f"trained in {time.perf_counter() - began:.0f} s"
    trained: Any = open_run(PACKAGE, run, device="cpu").model
    session = Session(trained.net.eval(), None)
    data = EvaluationScenes("test", scenes, start=HELD_OUT)
    image = torch.stack([item["image"] for item in data])  # pyright: ignore[reportGeneralTypeIssues]
    cells = torch.stack([item["cells"] for item in data])  # pyright: ignore[reportGeneralTypeIssues]
    present = torch.stack([(cells == digit).any(1) for digit in range(len(DIGITS))], dim=1)
    rows: list[dict[str, Any]] = []
    base: DigitsScores | None = None
    for name, method in methods().items():
        try:
            scores = evaluated(session.model, image, present, method)
        except ValueError as reason:
            rows.append({"method": name, "note": str(reason)})
            yield f"{name}: cannot work here: {reason}"
            continue
        base = base or scores
        rows.append({"method": name, **scores.row(), **_compared(base, scores)})
        yield (
            f"{name}: random {scores.accuracy('random'):.3f}, adversarial {scores.accuracy('adversarial'):.3f}, "
            f"CHAIR_s {scores.chair_s:.3f}, recall {scores.recall:.3f}"
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.json").write_text(json.dumps({"scenes": scenes, "run": str(run), "rows": rows}, indent=1) + "\n")
    pointing = draw_scenes(session, data, out / "scenes.png")
    yield f"pointing game: the brightest cell of a digit's word is its own in {100 * pointing:.0f} % (chance 6 %)"
    (out / "report.html").write_text(report(rows, scenes, pointing), encoding="utf-8")
    yield f"wrote {out / 'report.html'}, {out / 'demo.json'}, {out / 'scenes.png'}"


def evaluated(model: Any, image: torch.Tensor, present: torch.Tensor, method: Method | None) -> DigitsScores:
    """Scores of a model under a method; None is the model as it is."""
    if method is None:
        return scores_of(present, answer_all(model, image), caption_all(model, image))
    with intervene(model, method):
        return scores_of(present, answer_all(model, image), caption_all(model, image))


def draw_scenes(session: Session, data: EvaluationScenes, path: Path, *, count: int = 12) -> float:
    """A strip of scenes with the map of one of their digits' words; gives the share of maps whose peak is right."""
    from PIL import Image

    hits, pictures = [], []
    for number in range(min(4 * count, len(data))):
        shown = data.scenes[number]
        picture = Image.fromarray((shown.image * 255).astype("uint8")).convert("RGB")
        name = shown.names[0]
        inputs = session.prepare(picture, f"in the image is there a {name}")
        heat = explain(session.model, inputs, [inputs["input_ids"].shape[1] - 1], reading="attention")[0]
        hits.append(shown.cells[int(heat.argmax())] == shown.digits[0])
        if len(pictures) < count:
            size = (picture.height, picture.width)
            mark = "" if hits[-1] else " (missed)"
            pictures.append(overlay(picture, on_picture(heat, session.boxes(inputs, size), size), name + mark))
    strip(pictures).save(path)
    return sum(hits) / len(hits)


def report(rows: Sequence[Mapping[str, Any]], scenes: int, pointing: float) -> str:
    """The report as one HTML page beside ``scenes.png``."""
    columns = ["random", "popular", "adversarial", "chair_s", "chair_i", "recall", "mentions", "repeated"]
    head = "".join(f"<th>{name}</th>" for name in ["method", *columns, "CHAIR_s 95 %", "p, CHAIR_s", "p, adversarial"])
    body = ""
    for row in rows:
        name = html.escape(str(row["method"]))
        if "note" in row:
            body += f'<tr><td>{name}</td><td colspan="{len(columns) + 3}">{html.escape(str(row["note"]))}</td></tr>'
            continue
        cells = "".join(f"<td>{row[column]:.3f}</td>" for column in columns)
        low, high = row["interval"]
        tests = f"<td>{low:.3f} … {high:.3f}</td><td>{row['p_chair']:.2g}</td><td>{row['p_adversarial']:.2g}</td>"
        body += f"<tr><td>{name}</td>{cells}{tests}</tr>"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>vlm-tools demo</title><style>'
        "body{font:15px/1.5 system-ui,sans-serif;margin:2rem}td,th{padding:.2rem .7rem;text-align:right}"
        "td:first-child,th:first-child{text-align:left}tr:nth-child(even){background:#f1f3f5}</style></head><body>"
        f"<h1>Digits world: what interventions change</h1><p>{scenes} held-out scenes, greedy decoding. random, "
        "popular, adversarial: accuracy of POPE's three kinds of questions. chair_s: share of captions that name an "
        "absent digit, chair_i: share of such mentions; recall: share of present digits that are named. p: "
        "McNemar's exact test "
        f"against the baseline on the same scenes.</p><table><tr>{head}</tr>{body}</table>"
        f"<h2>Where a question's digit looks</h2><p>The brightest cell is the digit's own in {100 * pointing:.0f} % of "
        'cases; chance is 6 %.</p><img src="scenes.png" alt="attention maps over scenes"></body></html>\n'
    )


def _compared(base: DigitsScores, scores: DigitsScores) -> dict[str, Any]:
    return {
        "interval": interval(scores.hallucinated),
        "p_chair": mcnemar(base.hallucinated, scores.hallucinated),
        "p_adversarial": mcnemar(base.correct["adversarial"], scores.correct["adversarial"]),
    }
