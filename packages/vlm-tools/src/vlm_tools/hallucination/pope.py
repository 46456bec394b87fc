"""POPE: yes/no questions about present and absent objects, their answers' parsers and scores.

Paper: Li et al., Evaluating Object Hallucination in Large Vision-Language Models, EMNLP 2023, arXiv 2305.10355.
Official code: AoiDragon/POPE, ``utils.py`` (builder), ``evaluate.py`` (scores); VCD and AGLA score with the substring
parser of DAMO-NLP-SG/VCD, ``experiments/eval/eval_pope.py``.

The same: order of questions, choice of negatives, scores. Different: an object with a vowel gets "an" by the article
alone (the official builder replaces every "a" of the template: "an ... imange"); ``strict`` parsing with the share of
answers that are neither yes nor no; a popular or adversarial negative that does not exist is drawn, if any is left.
Checked in ``tests/hallucination/test_pope.py``.
"""

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlm_tools.hallucination.files import is_number, is_text, read_rows

Split = Literal["random", "popular", "adversarial"]
Parser = Literal["official", "substring", "strict"]
PARSERS: tuple[Parser, ...] = ("official", "substring", "strict")
TEMPLATE = "Is there a {} in the image?"


@dataclass(frozen=True)
class Question:
    """One question about one image; ``label`` is "yes" or "no"."""

    question_id: int
    image: str
    text: str
    label: str


def build_questions(
    objects: Mapping[str, Sequence[str]],
    split: Split,
    *,
    per_image: int | None = 3,
    template: str = TEMPLATE,
    seed: int = 0,
) -> list[Question]:
    """Questions about every image: its first objects, each followed by an absent one.

    Args:
        objects: image → its objects, at least ``per_image`` each.
        per_image: objects asked for in each image; None asks for all.
        split: absent objects are drawn from all (random), the most frequent (popular), or the one that most often
            accompanies the object just asked for (adversarial).
        template: the question with one ``{}``.
        seed: of the draws.

    Raises:
        ValueError: unknown split, template without ``{}``, too few objects, no absent object left.
    """
    if split not in ("random", "popular", "adversarial"):
        raise ValueError(f"build_questions: split must be random, popular or adversarial, got split={split!r}")
    if template.count("{}") != 1:
        raise ValueError(f"build_questions: template needs exactly one {{}}, got template={template!r}")
    draw = random.Random(seed)
    frequency = Counter(name for names in objects.values() for name in names)
    known = list(frequency)
    popular = [name for name, _ in frequency.most_common()]
    companions = _companions(objects)
    questions: list[Question] = []
    for image, present in objects.items():
        if per_image is not None and len(present) < per_image:
            raise ValueError(
                f"build_questions: image {image!r} has {len(present)} objects, per_image={per_image} asks for more; "
                "leave it out or lower per_image"
            )
        used = set(present)
        for name in present[:per_image]:
            questions.append(_question(len(questions) + 1, image, name, "yes", template))
            ranked = {"random": [], "popular": popular, "adversarial": companions.get(name, [])}[split]
            other = next((candidate for candidate in ranked if candidate not in used), None)
            if other is None:
                if used.issuperset(known):
                    raise ValueError(f"build_questions: no object is absent from image {image!r}; lower per_image")
                while other is None or other in used:  # the official draws, so that a seed gives the official questions
                    other = draw.choice(known)
            used.add(other)
            questions.append(_question(len(questions) + 1, image, other, "no", template))
    return questions


def _companions(objects: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Object → the others by how often they share an image with it; ties by first appearance."""
    counts: dict[str, Counter[str]] = {}
    for names in objects.values():
        for name in names:
            counts.setdefault(name, Counter()).update(other for other in names if other != name)
    return {name: [other for other, _ in found.most_common()] for name, found in counts.items()}


def _question(number: int, image: str, name: str, label: str, template: str) -> Question:
    if name[0] in "aeiou":
        template = re.sub(r"\ba \{\}", "an {}", template)
    return Question(number, image, template.format(name), label)


def read_questions(path: Path) -> list[Question]:
    """Questions of a released file: one JSON object per line, or one JSON array.

    Raises:
        ValueError: it cannot be read, or is neither; a question lacks a key, or its label is neither yes nor no.
    """
    fields = {"question_id": is_number, "image": is_text, "text": is_text, "label": _is_label}
    rows = read_rows(path, "read_questions", fields)
    return [Question(int(row["question_id"]), row["image"], row["text"], row["label"].strip().lower()) for row in rows]


def _is_label(value: object) -> bool:
    return isinstance(value, str) and value.strip().lower() in ("yes", "no")


def parse_answer(text: str, parser: Parser = "strict", *, label: str | None = None) -> bool | None:
    """Whether an answer says yes; None if ``strict`` finds neither or both.

    Args:
        parser: ``"official"``: no if the first sentence holds the word No, no or not, else yes. ``"substring"``
            (VCD, AGLA): needs the label; "yes" anywhere counts for yes, "no" anywhere ("know", "snow") for no.
            ``"strict"``: the words yes and no.
        label: the right answer.

    Raises:
        ValueError: unknown parser, or ``"substring"`` without a label.
    """
    if parser == "official":
        words = text.split(".")[0].replace(",", "").split(" ")
        return not {"No", "not", "no"} & set(words)
    if parser == "substring":
        if label not in ("yes", "no"):
            raise ValueError(f"parse_answer: parser='substring' needs label 'yes' or 'no', got label={label!r}")
        return "yes" in text.lower() if label == "yes" else "no" not in text.lower()
    if parser != "strict":
        raise ValueError(f"parse_answer: parser must be official, substring or strict, got parser={parser!r}")
    found = set(re.findall(r"[a-z]+", text.lower())) & {"yes", "no"}
    return found == {"yes"} if len(found) == 1 else None


@dataclass(frozen=True)
class PopeScores:
    """Shares in [0, 1]; ``correct`` holds one flag per question, for paired tests."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    unparseable: float
    correct: tuple[bool, ...]


def score(questions: Sequence[Question], answers: Sequence[str], *, parser: Parser = "strict") -> PopeScores:
    """Scores with yes as the positive class; an answer that cannot be parsed is wrong and counts as no.

    Raises:
        ValueError: as many answers as questions are needed, and at least one.
    """
    if not questions or len(questions) != len(answers):
        raise ValueError(f"score: {len(questions)} questions need as many answers and at least one, got {len(answers)}")
    said = [parse_answer(text, parser, label=question.label) for question, text in zip(questions, answers, strict=True)]
    truth = [question.label == "yes" for question in questions]
    hits = sum(bool(s) and t for s, t in zip(said, truth, strict=True))
    yes = sum(bool(s) for s in said)
    precision, recall = hits / yes if yes else 0.0, hits / sum(truth) if any(truth) else 0.0
    correct = tuple(s is not None and s == t for s, t in zip(said, truth, strict=True))
    return PopeScores(
        accuracy=sum(correct) / len(said),
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        yes_ratio=yes / len(said),
        unparseable=sum(s is None for s in said) / len(said),
        correct=correct,
    )
