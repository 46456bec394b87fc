"""CHAIR: objects that a caption names and the image does not hold; recall, length and repetition beside it.

Paper: Rohrbach et al., Object Hallucination in Image Captioning, EMNLP 2018, arXiv 1809.02156.
Official code: LisaAnne/Hallucination, ``utils/chair.py``; scored as the version of LALBJ/PAI, ``chair.py``.

The same: words to categories by synonyms, terms of two words first, an animal's "baby" and a vehicle's "passenger" no
person, no seat beside a toilet, every mention counts. Different: rules of English plurals instead of NLTK's tagger
and lemmatizer (no download); the list of synonyms is a file of yours, one category per line, as the official one; by
default each category stands for itself. Repetition and recall are printed because a caption that repeats itself
lowers CHAIR_i. Checked in ``tests/hallucination/test_chair.py``.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_tools.hallucination.files import is_text, is_texts, read_rows, read_text

_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
# "men" and "vases" are what WordNet makes of them, so that scores are those of the official code.
_IRREGULAR = {"people": "people", "children": "child", "men": "men", "women": "woman", "mice": "mouse",
              "knives": "knife", "geese": "goose", "oxen": "ox", "skis": "skis", "scissors": "scissors",
              "calves": "calf", "wolves": "wolf", "loaves": "loaf", "shelves": "shelf", "vases": "vas"}  # fmt: skip
_VERBS = {"skateboarding": "skateboard", "skiing": "ski", "snowboarding": "snowboard", "tied": "tie"}
_PLACES = ("train track", "home plate")  # hold a category's word and name none


def read_synonyms(path: Path) -> dict[str, list[str]]:
    """Category → words, from lines such as ``dog, puppy, hound``; the first word names the category.

    Raises:
        ValueError: the file cannot be read, or names no category.
    """
    lines = [[word.strip() for word in line.split(",")] for line in read_text(path, "read_synonyms").splitlines()]
    found = {words[0]: [word for word in words if word] for words in lines if words[0]}
    if not found:
        raise ValueError(f"read_synonyms: {path} names no category; one per line: dog, puppy, hound")
    return found


def read_captions(path: Path) -> tuple[list[str], list[list[str]]]:
    """Captions and the objects of their images, from lines such as ``{"caption": "a dog", "objects": ["dog"]}``.

    Raises:
        ValueError: the file cannot be read, holds no caption, or a line is no such record.
    """
    rows = read_rows(path, "read_captions", {"caption": is_text, "objects": is_texts})
    if not rows:
        raise ValueError(f'read_captions: {path} holds no line such as {{"caption": "a dog", "objects": ["dog"]}}')
    return [row["caption"] for row in rows], [row["objects"] for row in rows]


class Vocabulary:
    """Which category a word of a caption names.

    Args:
        synonyms: category → words and terms of two words, itself included.

    Raises:
        ValueError: no category.
    """

    def __init__(self, synonyms: Mapping[str, Sequence[str]]) -> None:
        if not synonyms:
            raise ValueError("Vocabulary: synonyms must name at least one category, got {}")
        self.category = {word: name for name, words in synonyms.items() for word in (name, *words)}
        self.pairs = {word: word for word in self.category if word.count(" ") == 1}
        self.pairs |= {f"{age} {animal}": animal for animal in _ANIMALS for age in ("baby", "adult")}
        self.pairs |= {place: place for place in _PLACES}
        self.pairs |= {"passenger jet": "jet", "passenger train": "train", "bow tie": "tie", "toilet seat": "toilet"}

    def mentions(self, caption: str) -> list[str]:
        """Categories in the order of their mentions, repeated ones too."""
        words = [singular(word, self.category) for word in re.findall(r"[a-z]+(?:-[a-z]+)*", caption.lower())]
        merged, place = [], 0
        while place < len(words):
            pair = " ".join(words[place : place + 2])
            merged.append(self.pairs.get(pair, words[place]))
            place += 2 if pair in self.pairs else 1
        if "toilet" in merged:
            merged = [word for word in merged if word != "seat"]
        return [self.category[word] for word in merged if word in self.category]


def singular(word: str, known: Collection[str]) -> str:
    """The singular of a word, or the word itself if it is a known one."""
    if word in known:
        return word
    if word in _IRREGULAR or word in _VERBS:
        return _IRREGULAR.get(word) or _VERBS[word]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    for ending in ("sses", "shes", "ches", "xes", "zes", "oes"):
        if word.endswith(ending):
            return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


@dataclass(frozen=True)
class ChairScores:
    """CHAIR and what it may hide.

    Attributes:
        chair_s: share of captions with an absent object.
        chair_i: share of mentions of absent objects.
        recall: share of present objects that are named.
        distinct_wrong: share of distinct named objects that are absent; repetition does not lower it.
        words: words per caption.
        distinct_4: share of distinct sequences of four words; low where captions repeat themselves.
        hallucinated: one flag per caption, for paired tests.
    """

    chair_s: float
    chair_i: float
    recall: float
    distinct_wrong: float
    words: float
    distinct_4: float
    hallucinated: tuple[bool, ...]


def score(captions: Sequence[str], objects: Sequence[Sequence[str]], vocabulary: Vocabulary) -> ChairScores:
    """Scores of captions against the objects of their images (categories).

    Raises:
        ValueError: not as many lists of objects as captions, or none.
    """
    if not captions or len(captions) != len(objects):
        raise ValueError(f"chair.score: {len(captions)} captions need as many lists of objects, got {len(objects)}")
    flags: list[bool] = []
    wrong = mentions = found = present = distinct = distinct_wrong = words = grams = own_grams = 0
    for caption, here in zip(captions, objects, strict=True):
        named, truth = vocabulary.mentions(caption), set(here)
        absent = [name for name in named if name not in truth]
        flags.append(bool(absent))
        wrong, mentions = wrong + len(absent), mentions + len(named)
        found, present = found + len(truth & set(named)), present + len(truth)
        distinct, distinct_wrong = distinct + len(set(named)), distinct_wrong + len(set(absent))
        tokens = caption.lower().split()
        words += len(tokens)
        four = list(zip(*(tokens[start:] for start in range(4)), strict=False))
        grams, own_grams = grams + len(four), own_grams + len(set(four))
    return ChairScores(
        chair_s=sum(flags) / len(flags),
        chair_i=wrong / max(mentions, 1),
        recall=found / max(present, 1),
        distinct_wrong=distinct_wrong / max(distinct, 1),
        words=words / len(captions),
        distinct_4=own_grams / max(grams, 1),
        hallucinated=tuple(flags),
    )
