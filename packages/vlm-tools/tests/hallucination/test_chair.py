"""CHAIR: words, mentions, repetition."""

from pathlib import Path

import pytest

from vlm_tools.hallucination import chair


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
