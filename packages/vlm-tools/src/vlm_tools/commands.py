"""The verbs of ``vlm-tools`` beside the shared ones: ask, caption, ground, explain, sinks, evaluate, demo."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from vlm_tools.benchmarks import amber, chair, pope
from vlm_tools.benchmarks.statistics import interval, mcnemar
from vlm_tools.explain import READINGS, explain, on_picture, record, with_answer
from vlm_tools.intervention import intervene
from vlm_tools.method import Method
from vlm_tools.models import METHODS, method_of
from vlm_tools.overlay import overlay, strip
from vlm_tools.page import write_page
from vlm_tools.session import Session, open_session, read_picture
from vlm_tools.sinks import find_sinks

Model = Annotated[
    str | None,
    typer.Option(
        help="Run directory, folder, or a name on the hub (default: newest digits-world run).", metavar="MODEL"
    ),
]
MethodName = Annotated[str | None, typer.Option("--method", help=f"{', '.join(METHODS)}.", metavar="NAME")]
Options = Annotated[
    list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Option of the method (repeatable).")
]
Picture = Annotated[Path, typer.Argument(help="Picture file.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<n>.")]
OutDir = Annotated[Path, typer.Option("--out", help="Where files are written.")]
Tokens = Annotated[int, typer.Option(help="Longest answer.", min=1)]
ReadingName = Annotated[str, typer.Option("--reading", help=f"{', '.join(READINGS)}.")]


def chosen_method(name: str | None, options: Sequence[str] | None) -> Method | None:
    """The method of ``--method`` and ``--option``.

    Raises:
        ValueError: unknown name or option, an option without value.
    """
    if name is None:
        if options:
            raise ValueError("--option belongs to --method, which is not given")
        return None
    values: dict[str, Any] = {}
    for option in options or ():
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"--option {option} must look like KEY=VALUE")
        try:
            values[key] = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"--option {option}: the value must be a number, true, false or a list") from None
    return method_of(name, **values)


def under(session: Session, method: Method | None) -> contextlib.AbstractContextManager[Any]:
    """The session's model under a method, or as it is."""
    return contextlib.nullcontext() if method is None else intervene(session.model, method)


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
    return ask(picture, prompt or "describe the image .", model, method, option, tokens, device)


def ground(
    picture: Picture,
    phrase: Annotated[str, typer.Argument(help="What to look for; its last token asks.")],
    model: Model = None,
    reading: ReadingName = "attention",
    out: OutDir = Path("explanations"),
    device: Device = "auto",
) -> Iterator[str]:
    """Where the model sees a phrase: heat map, no-image control, point prompt."""
    from vlm_tools.vl_sam import point_prompt

    shown = read_picture(picture)
    session = open_session(model, device=device)
    inputs = with_answer(session.prepare(shown, "describe the image ."), _row(session, session.encode(phrase)))
    row = inputs["input_ids"].shape[1] - 1
    target = [int(inputs["input_ids"][0, -1])]
    row = row - (reading not in ("attention", "rollout", "flow"))
    size = (shown.height, shown.width)
    boxes = session.boxes(inputs, size)
    options: dict[str, Any] = {"reading": reading}
    heat = explain(session.model, inputs, [row], target, **options)[0].float().cpu()
    control = explain(session.model, inputs, [row], target, control=True, **options)[0].float().cpu()
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{picture.stem}_{_slug(phrase)}_{reading}"
    maps = [on_picture(values, boxes, size) for values in (heat, control)]
    limits = _limits(heat, control)
    pictures = [
        overlay(shown, heat, name, limits=limits)
        for heat, name in zip(maps, (phrase, "without the image"), strict=True)
    ]
    strip(pictures).save(f"{file}.png")
    np.savez_compressed(f"{file}.npz", heat=heat, control=control, boxes=boxes, picture_size=size)
    prompt = point_prompt(maps[0])
    yield f"positive point {prompt.positive}, negative point {prompt.negative} (x, y in pixels)"
    yield f"wrote {file}.png, {file}.npz"


def explain_answer(
    picture: Picture,
    prompt: Annotated[str, typer.Argument(help="Question or instruction.")] = "describe the image .",
    model: Model = None,
    reading: ReadingName = "attention",
    method: MethodName = None,
    option: Options = None,
    out: OutDir = Path("explanations"),
    tokens: Tokens = 32,
    device: Device = "auto",
) -> Iterator[str]:
    """Where each word of an answer looks: a strip of pictures, raw maps, and a page to explore."""
    shown, chosen = read_picture(picture), chosen_method(method, option)
    session = open_session(model, device=device)
    inputs = session.prepare(shown, prompt)
    with under(session, chosen):
        answer = session.answer(inputs, tokens)
    words = session.words(answer[0].tolist())
    yield f"answer: {session.text(answer[0].tolist())}"
    whole = with_answer(inputs, answer)
    first = inputs["input_ids"].shape[1]
    rows = [first - 1 + number for number in range(answer.shape[1])]
    options: dict[str, Any] = {"reading": reading}
    heat = explain(session.model, whole, rows, answer[0].tolist(), **options).float().cpu()
    control = explain(session.model, whole, rows, answer[0].tolist(), control=True, **options).float().cpu()
    size = (shown.height, shown.width)
    boxes = session.boxes(whole, size)
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{picture.stem}_{_slug(prompt)}_{reading}"
    limits = _limits(heat)
    kept = [number for number, word in enumerate(words) if word.strip()]
    pictures = [overlay(shown, on_picture(heat[n], boxes, size), words[n], limits=limits) for n in kept]
    strip(pictures).save(f"{file}.png")
    np.savez_compressed(f"{file}.npz", heat=heat, control=control, boxes=boxes, words=np.array(words))
    recorder = record(session.model, whole)
    visual = recorder.visual
    assert visual is not None
    maps = torch.stack([torch.stack([r.row(row)[:, visual] for r in recorder.records.values()]) for row in rows])
    page = write_page(shown, prompt, [words[n] for n in kept], maps[kept].float().cpu(), boxes)
    Path(f"{file}.html").write_text(page, encoding="utf-8")
    difference = float((heat - control).abs().mean() / heat.abs().mean().clamp_min(1e-12))
    yield f"difference from the no-image control: {100 * difference:.0f} % of the mean relevance"
    yield f"wrote {file}.png, {file}.npz, {file}.html"


def sinks(
    picture: Picture,
    model: Model = None,
    tau: Annotated[float, typer.Option(help="Least |x| / RMS(x) of a sink.")] = 20.0,
    prompt: Annotated[str, typer.Option(help="Prompt to run.")] = "describe the image .",
    device: Device = "auto",
) -> Iterator[str]:
    """Find the sink dimensions of a model, which VAR needs."""
    shown = read_picture(picture)
    session = open_session(model, device=device)
    found = find_sinks(session.model, session.prepare(shown, prompt), tau=tau)
    yield f"sink dimensions: {', '.join(map(str, found.dims))}"
    yield f"use them: VAR(dims={list(found.dims)}) or --method var --option 'dims={list(found.dims)}'"


def evaluate(
    benchmark: Annotated[str, typer.Argument(help="pope, chair or amber.")],
    file: Annotated[Path, typer.Argument(help="Questions (pope, amber), or captions with objects (chair).")],
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures (pope, amber).")] = None,
    annotations: Annotated[Path | None, typer.Option(help="annotations.json (amber).")] = None,
    relations: Annotated[
        Path | None, typer.Option(help="relation.json: score descriptions, not yes/no answers (amber).")
    ] = None,
    synonyms: Annotated[Path | None, typer.Option(help="One category per line: dog, puppy, hound (chair).")] = None,
    model: Model = None,
    method: MethodName = None,
    option: Options = None,
    parser: Annotated[str, typer.Option(help="official, substring or strict (pope).")] = "strict",
    limit: Annotated[int | None, typer.Option(help="First questions only.", min=1)] = None,
    tokens: Tokens = 8,
    device: Device = "auto",
) -> Iterator[str]:
    """Score a model on local files, with and without a method, with a paired test and intervals."""
    if benchmark == "chair":
        yield from _chair(file, synonyms)
        return
    if benchmark not in ("pope", "amber"):
        raise ValueError(f"evaluate: benchmark must be pope, chair or amber, got {benchmark!r}")
    if images is None:
        raise ValueError(f"evaluate: {benchmark} needs --images, the folder of its pictures")
    if benchmark == "amber":
        if annotations is None:
            raise ValueError("evaluate: amber needs --annotations, its annotations.json")
        everything = amber.read_amber(file, annotations)
        if relations is not None:
            described = [row for row in everything if not isinstance(row.truth, str)][:limit]
            session = open_session(model, device=device)
            yield from _amber(session, described, images, relations, chosen_method(method, option), tokens)
            return
        rows = [row for row in everything if isinstance(row.truth, str)]
        questions = [pope.Question(row.id, row.image, row.query, str(row.truth)) for row in rows]
    else:
        questions = pope.read_questions(file)
    questions = questions[:limit]
    if not questions:
        raise ValueError(f"evaluate: {file} holds no yes/no question")
    chosen = chosen_method(method, option)
    session = open_session(model, device=device)
    base = _pope(session, questions, images, None, tokens, parser)
    yield _line("baseline", base)
    if chosen is not None:
        other = _pope(session, questions, images, chosen, tokens, parser)
        yield _line(chosen.name, other)
        yield f"McNemar's p for equal accuracy: {mcnemar(base.correct, other.correct):.3g}"


def _pope(
    session: Session, questions: Sequence[pope.Question], images: Path, method: Method | None, tokens: int, parser: Any
) -> pope.PopeScores:
    answers = []
    with under(session, method):
        for question in questions:
            inputs = session.prepare(read_picture(images / question.image), question.text)
            answers.append(session.text(session.answer(inputs, tokens)[0].tolist()))
    return pope.score(questions, answers, parser=parser)


def _amber(
    session: Session,
    queries: Sequence[amber.AmberQuery],
    images: Path,
    relations: Path,
    method: Method | None,
    tokens: int,
) -> Iterator[str]:
    related = amber.read_relations(relations)
    found: list[amber.AmberScores] = []
    for chosen in (None,) if method is None else (None, method):
        texts = []
        with under(session, chosen):
            for query in queries:
                inputs = session.prepare(read_picture(images / query.image), query.query)
                texts.append(session.text(session.answer(inputs, tokens)[0].tolist()))
        scores = amber.generative(queries, texts, related)
        found.append(scores)
        low, high = interval(scores.hallucinated)
        yield (
            f"{'baseline' if chosen is None else chosen.name}: CHAIR {scores.chair:.3f}, Cover {scores.cover:.3f}, "
            f"Hal {scores.hal:.3f} (95 % {low:.3f} … {high:.3f}), Cog {scores.cog:.3f}"
        )
    if len(found) > 1:
        yield f"McNemar's p for equal Hal: {mcnemar(found[0].hallucinated, found[1].hallucinated):.3g}"


def _line(name: str, scores: pope.PopeScores) -> str:
    low, high = interval(scores.correct)
    return (
        f"{name}: accuracy {scores.accuracy:.3f} (95 % {low:.3f} … {high:.3f}), F1 {scores.f1:.3f}, "
        f"yes {scores.yes_ratio:.3f}, unparseable {scores.unparseable:.3f}"
    )


def _chair(file: Path, synonyms: Path | None) -> Iterator[str]:
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        captions, objects = [row["caption"] for row in rows], [row["objects"] for row in rows]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f'evaluate: {file} must hold lines {{"caption": …, "objects": […]}} ({error})') from None
    known = {name: [name] for names in objects for name in names}
    found = chair.score(captions, objects, chair.Vocabulary(chair.read_synonyms(synonyms) if synonyms else known))
    low, high = interval(found.hallucinated)
    yield f"CHAIR_s {found.chair_s:.3f} (95 % {low:.3f} … {high:.3f}), CHAIR_i {found.chair_i:.3f}"
    yield f"recall {found.recall:.3f}, distinct wrong {found.distinct_wrong:.3f}"
    yield f"words {found.words:.1f}, distinct 4-grams {found.distinct_4:.3f}"


def _limits(*maps: torch.Tensor) -> tuple[float, float]:
    low, high = min(float(m.min()) for m in maps), max(float(m.max()) for m in maps)
    return low, high if high > low else low + 1e-6


def _row(session: Session, tokens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([list(tokens)], device=session.model.device)


def _slug(text: str) -> str:
    return "_".join("".join(c if c.isalnum() else " " for c in text.lower()).split())[:40] or "prompt"
