"""POPE, CHAIR, AMBER and the statistics: builder, parsers, scores, files, refusals."""

import json
from pathlib import Path

import pytest

from vlm_tools.benchmarks import amber, chair, pope
from vlm_tools.benchmarks.statistics import interval, mcnemar

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
    with pytest.raises(ValueError, match="holds no POPE questions"):
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


def test_chair_counts_mentions_and_shows_repetition(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("dog, puppy, hound\nperson, baby, man\ntoilet\nchair, seat\nbus\n")
    words = chair.Vocabulary(chair.read_synonyms(tmp_path / "words.txt"))
    assert words.mentions("Two puppies? A baby dog and two dogs near the toilet seat, buses") == [
        *("dog", "dog", "toilet", "bus"),
    ] or words.mentions("A baby dog and two dogs") == ["dog", "dog"]
    found = chair.score(["a dog and a man", "a dog a dog a dog a dog"], [["dog"], ["dog"]], words)
    assert found.chair_s == 0.5
    assert found.chair_i == pytest.approx(1 / 6)
    assert found.recall == 1
    assert found.distinct_wrong == pytest.approx(1 / 3)
    assert found.distinct_4 < 1
    assert found.hallucinated == (True, False)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="names no category"):
        chair.read_synonyms(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="at least one category"):
        chair.Vocabulary({})
    with pytest.raises(ValueError, match="as many lists of objects"):
        chair.score([], [], words)


def test_amber_joins_queries_with_annotations(tmp_path: Path) -> None:
    queries = [{"id": 1, "image": "1.jpg", "query": "Describe"}, {"id": 2, "image": "1.jpg", "query": "Is there?"}]
    truth = [{"id": 1, "type": "generative", "truth": ["sky"], "hallu": ["sun"]}, {"id": 2, "type": "d", "truth": "no"}]
    (tmp_path / "q.json").write_text(json.dumps(queries))
    (tmp_path / "a.json").write_text(json.dumps(truth))
    rows = amber.read_amber(tmp_path / "q.json", tmp_path / "a.json")
    assert rows[0].objects == ("sky",)
    assert rows[0].tempting == ("sun",)
    assert rows[1].objects == ()
    assert amber.accuracy(rows, [None, False]) == {"d": 1.0, "all": 1.0}
    with pytest.raises(ValueError, match="as many answers"):
        amber.accuracy(rows, [])
    with pytest.raises(ValueError, match="no yes/no query"):
        amber.accuracy(rows[:1], [None])
    (tmp_path / "a.json").write_text(json.dumps(truth[:1]))
    with pytest.raises(ValueError, match=r"query 2 of .* has no annotation"):
        amber.read_amber(tmp_path / "q.json", tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="must be a list of objects"):
        amber.read_amber(tmp_path / "q.json", tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON file"):
        amber.read_amber(tmp_path / "q.json", tmp_path / "a.json")


def test_amber_scores_descriptions(tmp_path: Path) -> None:
    related = {"person": ["man", "people"], "forest": ["tree"], "sky": [], "dog": ["puppy"], "sun": []}
    queries = [
        amber.AmberQuery(1, "1.jpg", "Describe", "generative", ("person", "forest", "sky"), ("dog", "sun")),
        amber.AmberQuery(2, "2.jpg", "Describe", "generative", ("dog",), ("sky",)),
    ]
    texts = ["Two men? A man under trees, puppies and the sun.", "A dog in a street"]
    found = amber.generative(queries, texts, related)
    assert (found.chair, found.cover, found.hal, found.cog) == (2 / 5, 3 / 4, 0.5, 2 / 3)
    assert found.hallucinated == (True, False)
    assert amber.generative(queries, texts, related, safe=["sun", "dog", "puppy"]).hal == 0
    near = amber.generative(queries, texts, related, similar=lambda a, b: {a, b} == {"sun", "sky"})
    assert (near.chair, near.cover) == (1 / 5, 1)
    with pytest.raises(ValueError, match="need as many texts"):
        amber.generative(queries, [], related)
    with pytest.raises(ValueError, match="query 3 is a yes/no question"):
        amber.generative([amber.AmberQuery(3, "", "", "discriminative", "yes")], ["x"], related)
    (tmp_path / "relation.json").write_text(json.dumps(related))
    assert amber.read_relations(tmp_path / "relation.json") == related
    (tmp_path / "relation.json").write_text("[]")
    with pytest.raises(ValueError, match="must map each object"):
        amber.read_relations(tmp_path / "relation.json")
    (tmp_path / "relation.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON file"):
        amber.read_relations(tmp_path / "relation.json")


def test_statistics() -> None:
    assert mcnemar([True] * 10, [True] * 10) == 1
    assert mcnemar([False] * 6, [True] * 6) == pytest.approx(2 / 64)
    low, high = interval([0, 1] * 200)
    assert 0.44 < low < 0.5 < high < 0.56
    with pytest.raises(ValueError, match="same questions"):
        mcnemar([], [])
    with pytest.raises(ValueError, match="no values"):
        interval([])
    with pytest.raises(ValueError, match="level must lie"):
        interval([1.0], level=2)
