"""Every method on held-out scenes of the digits world, and a report: what ``vlm-tools demo`` shows."""

import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlm_tools.data.digits_world import EvaluationScenes
from vlm_tools.data.words import DIGITS
from vlm_tools.digits.evaluation import DigitsScores, answer_all, caption_all, scores_of
from vlm_tools.hallucination.statistics import interval, mcnemar
from vlm_tools.intervention.hooking import intervene
from vlm_tools.intervention.method import Method
from vlm_tools.methods.act import ACT
from vlm_tools.methods.agla import AGLA
from vlm_tools.methods.identity import Identity
from vlm_tools.methods.logit_boost import LogitBoost
from vlm_tools.methods.pai import PAI
from vlm_tools.methods.paint import PAINT
from vlm_tools.methods.var import VAR
from vlm_tools.methods.vcd import VCD
from vlm_tools.models.session import Session
from vlm_tools.pictures.overlay import overlay, strip
from vlm_tools.readings.explain import explain, on_picture

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


def compare(model: Any, data: EvaluationScenes) -> Iterator[dict[str, Any]]:
    """One row for each of `methods`: its name and scores beside the baseline's, or why it cannot work on the model."""
    image = torch.stack([item["image"] for item in data])  # pyright: ignore[reportGeneralTypeIssues]
    cells = torch.stack([item["cells"] for item in data])  # pyright: ignore[reportGeneralTypeIssues]
    present = torch.stack([(cells == digit).any(1) for digit in range(len(DIGITS))], dim=1)
    base: DigitsScores | None = None
    for name, method in methods().items():
        try:
            scores = evaluated(model, image, present, method)
        except ValueError as reason:
            yield {"method": name, "note": str(reason)}
            continue
        base = base or scores
        yield {"method": name, **scores.row(), **_compared(base, scores)}


def evaluated(model: Any, image: torch.Tensor, present: torch.Tensor, method: Method | None) -> DigitsScores:
    """Scores of a model under a method; None is the model as it is."""
    if method is None:
        return scores_of(present, answer_all(model, image), caption_all(model, image))
    with intervene(model, method):
        return scores_of(present, answer_all(model, image), caption_all(model, image))


def draw_scenes(session: Session, data: EvaluationScenes, path: Path, *, count: int = 12) -> float:
    """A strip of scenes with the map of one of their digits' words; gives the share of maps whose peak is right."""
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
        "body{font:15px/1.5 system-ui,sans-serif;margin:1.5rem auto;max-width:1052px;padding:0 1rem;color:#222}"
        "table{font-size:13px;border-collapse:collapse;width:100%}td,th{padding:.2rem .4rem;text-align:right}"
        "td:first-child,th:first-child,td[colspan]{text-align:left}tr:nth-child(even){background:#f1f3f5}"
        "img{max-width:100%}</style></head><body>"
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
