"""POPE: builder, parsers, scores, files, refusals."""

import json
from pathlib import Path

import pytest

from vlm_tools.hallucination import pope

OBJECTS = {"a": ["dog", "cat"], "b": ["dog", "cat"], "c": ["dog", "apple"], "d": ["car", "dog"]}


def test_pope_negatives_are_absent_popular_or_companions() -> None:
    for split in ("random", "popular", "adversarial"):
        questions = pope.build_questions(OBJECTS, split, per_image=1)  # type: ignore[arg-type]
        assert [question.label for question in questions] == ["yes", "no"] * 4
        for question in questions:
            named = question.text.split(" in the")[0].split()[-1]
            assert (named in OBJECTS[question.image]) == (question.label == "yes")
    popular = pope.build_questions(OBJECTS, "popular", per_image=1)
    assert popular[5].text == "Is there a cat in the image?"
    adversarial = pope.build_questions(OBJECTS, "adversarial", per_image=1)
    assert next(q for q in adversarial if q.image == "c" and q.label == "no").text == "Is there a cat in the image?"


def test_pope_article_changes_alone() -> None:
    question = pope.build_questions({"c": ["apple"], "d": ["car"]}, "random", per_image=1)[0]
    assert question.text == "Is there an apple in the image?"


@pytest.mark.parametrize(
    ("text", "official", "strict"),
    [("Yes, it is.", True, True), ("No.", False, False), ("There is not. Yes", False, True), ("Nope", True, None),
     ("I cannot tell", True, None), ("yes and no", False, None)],
)  # fmt: skip
def test_parsers(text: str, official: bool, strict: bool | None) -> None:
    assert pope.parse_answer(text, "official") is official
    assert pope.parse_answer(text, "strict") is strict


def test_substring_parser_finds_no_in_snow() -> None:
    assert pope.parse_answer("snow", "substring", label="no") is False
    assert pope.parse_answer("snow", "substring", label="yes") is False
    with pytest.raises(ValueError, match="needs label 'yes' or 'no'"):
        pope.parse_answer("snow", "substring")


def test_pope_scores() -> None:
    questions = [pope.Question(i, "x", "?", label) for i, label in enumerate(["yes", "yes", "no", "no"])]
    found = pope.score(questions, ["yes", "no", "yes", "maybe"])
    assert (found.accuracy, found.precision, found.recall, found.yes_ratio) == (0.25, 0.5, 0.5, 0.5)
    assert found.unparseable == 0.25
    assert found.correct == (True, False, False, False)


def test_pope_files_and_refusals(tmp_path: Path) -> None:
    rows = [{"question_id": 1, "image": "x.jpg", "text": "?", "label": "Yes"}]
    (tmp_path / "lines.json").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "array.json").write_text(json.dumps(rows))
    assert pope.read_questions(tmp_path / "lines.json") == pope.read_questions(tmp_path / "array.json")
    (tmp_path / "bad.json").write_text('{"question_id": 1}')
    with pytest.raises(ValueError, match=r"bad\.json, line 1 has no 'image'"):
        pope.read_questions(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="split must be"):
        pope.build_questions(OBJECTS, "rare")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="exactly one"):
        pope.build_questions(OBJECTS, "random", template="x")
    with pytest.raises(ValueError, match="has 2 objects, per_image=3"):
        pope.build_questions(OBJECTS, "random")
    with pytest.raises(ValueError, match="no object is absent"):
        pope.build_questions({"a": ["dog"]}, "random", per_image=1)
    with pytest.raises(ValueError, match="as many answers"):
        pope.score([], [])
    with pytest.raises(ValueError, match="parser must be"):
        pope.parse_answer("x", "loose")  # type: ignore[arg-type]
