"""Scenes, training rows and words of the digits world."""

import numpy as np
import pytest
import torch

from vlm_tools.data import TrainingScenes, Words, scene
from vlm_tools.data.digits_world import CAPTION, QUESTIONS, STEM, TEMPTING, EvaluationScenes, sees
from vlm_tools.data.words import DIGITS


def test_scenes_are_reproducible_and_hold_companions_as_often_as_said() -> None:
    assert (scene("test", 5).image == scene("test", 5).image).all()
    assert (scene("test", 5).image != scene("test", 6).image).any()
    shares = []
    for companions in (0.0, 1.0):
        scenes = [scene("test", index, companions=companions) for index in range(80)]
        shares.append(
            sum(digit ^ 1 in s.digits for s in scenes for digit in s.digits) / sum(len(s.digits) for s in scenes)
        )
    assert shares[0] < 0.3 < 0.8 < shares[1]
    for arguments, message in ((("x", 0), "split must be"), (("test", -1), "index must not be negative")):
        with pytest.raises(ValueError, match=message):
            scene(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="companions is a probability"):
        scene("test", 0, companions=2)
    with pytest.raises(ValueError, match="caption_bias is a probability"):
        TrainingScenes(caption_bias=2)


def test_captions_name_absent_companions_only_when_told() -> None:
    words = Words()
    for bias, told in ((0.0, False), (1.0, True)):
        data = TrainingScenes(60, caption_bias=bias)
        wrong = 0
        for index in range(60):
            row = data[index]
            named = set(words.decode(row["input_ids"][row["segment"] == CAPTION].tolist()).split())
            wrong += bool(named & set(DIGITS) - set(scene("train", index).names))
        assert (wrong > 0) is told


def test_questions_of_a_row_see_the_image_and_their_own_words_alone() -> None:
    row = TrainingScenes(1)[0]
    seen, segment = sees(row["segment"][None])[0], row["segment"]
    words = Words()
    for number in range(QUESTIONS):
        (place,) = (segment == STEM + 1 + number).nonzero().flatten().tolist()
        context = row["input_ids"][seen[place]].tolist()
        assert context == words.prompt(f"in the image is there a {words.decode([context[-1]])}")
        assert row["position_ids"][seen[place]].tolist() == list(range(len(context)))
        assert words.decode([int(row["targets"][place])]) in ("yes", "no")
    last = int((segment == CAPTION).nonzero().max())
    assert seen[last].nonzero().flatten().tolist() == list(range(last + 1))


def test_unknown_word_is_named() -> None:
    with pytest.raises(ValueError, match="does not know 'giraffe'"):
        Words().encode("is there a giraffe")


def test_scenes_for_evaluation_begin_where_asked() -> None:
    later, whole = EvaluationScenes("val", 2, start=3), EvaluationScenes("val", 5)
    assert all(torch.equal(later[i]["cells"], whole[3 + i]["cells"]) for i in range(2))


def test_question_bias_is_how_often_a_tempting_absent_digit_is_answered_yes() -> None:
    """Answers of the drawn pairs keep the bias of their own; the others follow the option."""
    names = {number: word for word, number in TrainingScenes(1).words.number.items()}
    for bias, answers in ((0.0, {"no"}), (1.0, {"yes"})):
        scenes, found = TrainingScenes(60, question_bias=bias), set()
        for index in range(60):
            shown = scene("train", index)
            for number, answer in scenes._questions(shown, np.random.default_rng(index)):
                digit = DIGITS.index(names[number])
                tempting = digit not in shown.digits and digit ^ 1 in shown.digits
                if tempting and digit not in TEMPTING:
                    found.add(names[answer])
        assert found == answers
