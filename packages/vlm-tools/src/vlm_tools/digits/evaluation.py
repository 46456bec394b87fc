"""Questions and captions of the digits world, answered by a model and scored: POPE, CHAIR, recall."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlm_tools.data.digits_world import CAPTION_PROMPT, QUESTION
from vlm_tools.data.words import DIGITS, Words
from vlm_tools.hallucination.pope import Split, build_questions

SPLITS: tuple[Split, ...] = ("random", "popular", "adversarial")
CAPTION_TOKENS = 30  # the longest caption names eight digits in 28 tokens


def answer_all(model: Any, image: Float[Tensor, "B 1 Y X"]) -> Bool[Tensor, "B 10"]:
    """Whether the model says yes to each digit; rows are questions, so interventions see them as a user's."""
    words = Words()
    prompts = torch.tensor([words.prompt(QUESTION.format(name)) for name in DIGITS], device=image.device)
    ids = prompts.repeat(len(image), 1)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=image.repeat_interleave(len(DIGITS), dim=0),
            max_new_tokens=1,
            do_sample=False,
        )
    return (out[:, -1] == words.number["yes"]).view(len(image), len(DIGITS))


def caption_all(model: Any, image: Float[Tensor, "B 1 Y X"]) -> list[str]:
    """Greedy captions."""
    words = Words()
    ids = torch.tensor(words.prompt(CAPTION_PROMPT), device=image.device).expand(len(image), -1)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=image,
            max_new_tokens=CAPTION_TOKENS,
            do_sample=False,
        )
    return [words.decode(row) for row in out[:, ids.shape[1] :].tolist()]


@dataclass(frozen=True)
class DigitsScores:
    """Scores of one model under one method.

    Attributes:
        correct: split → one flag per question, for paired tests.
        yes_ratio: split → share of yes.
        hallucinated: per caption, whether it names an absent digit.
        chair_i: share of mentions that name an absent digit.
        recall: share of present digits that are named.
        mentions: digits named per caption.
        repeated: share of mentions that repeat an earlier one of their caption.
    """

    correct: Mapping[str, tuple[bool, ...]]
    yes_ratio: Mapping[str, float]
    hallucinated: tuple[bool, ...]
    chair_i: float
    recall: float
    mentions: float
    repeated: float

    @property
    def chair_s(self) -> float:
        """Share of captions that name an absent digit."""
        return sum(self.hallucinated) / len(self.hallucinated)

    def accuracy(self, split: str) -> float:
        """Share of questions answered as the labels say."""
        return sum(self.correct[split]) / len(self.correct[split])

    def row(self) -> dict[str, float]:
        """Plain numbers by name."""
        shares = {split: self.accuracy(split) for split in SPLITS}
        return {**shares, "chair_s": self.chair_s, "chair_i": self.chair_i, "recall": self.recall,
                "mentions": self.mentions, "repeated": self.repeated}  # fmt: skip


def scores_of(present: Bool[Tensor, "S 10"], says: Bool[Tensor, "S 10"], captions: Sequence[str]) -> DigitsScores:
    """Score answers and captions of S scenes.

    Raises:
        ValueError: the three do not describe equally many scenes.
    """
    if not len(present) == len(says) == len(captions):
        raise ValueError(
            f"scores_of: {len(present)} scenes, {len(says)} rows of answers and {len(captions)} captions do not fit"
        )
    objects = {str(n): [DIGITS[d] for d in row.nonzero().flatten().tolist()] for n, row in enumerate(present)}
    correct: dict[str, tuple[bool, ...]] = {}
    yes_ratio: dict[str, float] = {}
    for split in SPLITS:
        flags, yes = [], 0
        for question in build_questions(objects, split, per_image=None, template="{}"):  # pyright: ignore[reportArgumentType]
            said = bool(says[int(question.image), DIGITS.index(question.text)])
            yes += said
            flags.append(said == (question.label == "yes"))
        correct[split] = tuple(flags)
        yes_ratio[split] = yes / len(flags)
    hallucinated, wrong, mentions, found, repeated = [], 0, 0, 0, 0
    for row, caption in zip(present, captions, strict=True):
        named = [DIGITS.index(word) for word in re.findall(r"[a-z]+", caption) if word in DIGITS]
        absent = [digit for digit in named if not row[digit]]
        hallucinated.append(bool(absent))
        wrong, mentions = wrong + len(absent), mentions + len(named)
        found += sum(bool(row[digit]) for digit in set(named))
        repeated += len(named) - len(set(named))
    return DigitsScores(
        correct=correct,
        yes_ratio=yes_ratio,
        hallucinated=tuple(hallucinated),
        chair_i=wrong / max(mentions, 1),
        recall=found / int(present.sum()),
        mentions=mentions / len(captions),
        repeated=repeated / max(mentions, 1),
    )
