"""``vlm-tools evaluate``: POPE, CHAIR and AMBER on local files."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attn_core.catalog import did_you_mean
from vlm_tools.commands.options import Device, MethodName, Model, Options, Tokens, chosen_method, under

if TYPE_CHECKING:
    from vlm_tools.hallucination import amber, pope
    from vlm_tools.intervention.method import Method
    from vlm_tools.models.session import Session


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
    from vlm_tools.hallucination import amber, pope
    from vlm_tools.hallucination.pope import PARSERS
    from vlm_tools.hallucination.statistics import mcnemar
    from vlm_tools.models.session import open_session

    if benchmark == "chair":
        yield from _chair(file, synonyms)
        return
    if benchmark not in ("pope", "amber"):
        raise ValueError(f"evaluate: benchmark must be pope, chair or amber, got {benchmark!r}")
    if parser not in PARSERS:
        raise ValueError(f"--parser {parser}: unknown parser{did_you_mean(parser, PARSERS)}")
    if images is None:
        raise ValueError(f"evaluate: {benchmark} needs --images, the folder of its pictures")
    if benchmark == "amber":
        if annotations is None:
            raise ValueError("evaluate: amber needs --annotations, its annotations.json")
        everything = amber.read_amber(file, annotations)
        if relations is not None:
            described = [row for row in everything if not isinstance(row.truth, str)][:limit]
            if not described:
                raise ValueError(f"evaluate: {file} holds no query for a description; leave --relations out")
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
    session: "Session",
    questions: "Sequence[pope.Question]",
    images: Path,
    method: "Method | None",
    tokens: int,
    parser: Any,
) -> "pope.PopeScores":
    from vlm_tools.hallucination import pope
    from vlm_tools.models.session import read_picture

    answers = []
    with under(session, method):
        for question in questions:
            inputs = session.prepare(read_picture(images / question.image), question.text)
            answers.append(session.text(session.answer(inputs, tokens)[0].tolist()))
    return pope.score(questions, answers, parser=parser)


def _amber(
    session: "Session",
    queries: "Sequence[amber.AmberQuery]",
    images: Path,
    relations: Path,
    method: "Method | None",
    tokens: int,
) -> Iterator[str]:
    from vlm_tools.hallucination import amber
    from vlm_tools.hallucination.statistics import interval, mcnemar
    from vlm_tools.models.session import read_picture

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


def _line(name: str, scores: "pope.PopeScores") -> str:
    from vlm_tools.hallucination.statistics import interval

    low, high = interval(scores.correct)
    return (
        f"{name}: accuracy {scores.accuracy:.3f} (95 % {low:.3f} … {high:.3f}), F1 {scores.f1:.3f}, "
        f"yes {scores.yes_ratio:.3f}, unparseable {scores.unparseable:.3f}"
    )


def _chair(file: Path, synonyms: Path | None) -> Iterator[str]:
    from vlm_tools.hallucination import chair
    from vlm_tools.hallucination.statistics import interval

    captions, objects = chair.read_captions(file)
    known = {name: [name] for names in objects for name in names}
    if synonyms is None and not known:
        raise ValueError(f"evaluate: no caption of {file} has objects, so no word is known; pass --synonyms")
    found = chair.score(captions, objects, chair.Vocabulary(chair.read_synonyms(synonyms) if synonyms else known))
    low, high = interval(found.hallucinated)
    yield f"CHAIR_s {found.chair_s:.3f} (95 % {low:.3f} … {high:.3f}), CHAIR_i {found.chair_i:.3f}"
    yield f"recall {found.recall:.3f}, distinct wrong {found.distinct_wrong:.3f}"
    yield f"words {found.words:.1f}, distinct 4-grams {found.distinct_4:.3f}"
