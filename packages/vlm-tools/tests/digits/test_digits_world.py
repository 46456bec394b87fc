"""The digits world: scenes, rows, words, scores, and a training step that learns."""

import pytest
import torch

from vlm_tools import create_model, list_models, method_of
from vlm_tools.digits import EvaluationScenes, TrainingScenes, Words, scene
from vlm_tools.digits.evaluation import scores_of
from vlm_tools.digits.llava import digits_world_llava
from vlm_tools.digits.task import DigitsLlavaTask, Hallucination
from vlm_tools.digits.words import DIGITS
from vlm_tools.digits.world import CAPTION, QUESTIONS, STEM, sees
from vlm_tools.models import card


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


def test_model_learns_in_a_few_steps() -> None:
    torch.manual_seed(0)
    task = DigitsLlavaTask()
    data = TrainingScenes(16)
    batch = {key: torch.stack([data[i][key] for i in range(16)]) for key in data[0]}
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss = sum(task.loss(**batch).values())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
        losses.append(float(loss.detach()))  # type: ignore[union-attr]
    assert losses[-1] < 0.8 * losses[0]
    scenes = EvaluationScenes("val", 12)
    results = task.eval().predict(**{key: torch.stack([s[key] for s in scenes]) for key in scenes[0]})  # type: ignore
    metric = Hallucination()
    metric.process(None, results)
    assert {"random", "adversarial", "chair_s", "recall", "cells"} <= set(metric.compute_metrics(metric.results))
    with pytest.raises(ValueError, match="width must be a multiple of heads"):
        digits_world_llava(width=97)


def test_scores_count_mentions_of_absent_digits() -> None:
    present = torch.zeros(3, 10, dtype=torch.bool)
    present[0, 3] = present[1, [1, 2]] = present[2, [5, 6]] = True
    found = scores_of(present, present, ["a three and a four and a four", "a one", "a five"])
    assert found.chair_s == pytest.approx(1 / 3)
    assert found.chair_i == pytest.approx(2 / 5)
    assert found.recall == pytest.approx(3 / 5)
    assert found.repeated == pytest.approx(1 / 5)
    assert found.accuracy("adversarial") == 1
    with pytest.raises(ValueError, match="do not fit"):
        scores_of(present, present, [])


def test_every_name_builds_and_mistakes_are_named() -> None:
    for name in list_models():
        assert create_model(name) is not None
        assert card(name).test.endswith(".py")
    with pytest.raises(ValueError, match="unknown model 'varr'; did you mean 'var'"):
        create_model("varr")
    with pytest.raises(ValueError, match="var has no option 'kep'; did you mean 'keep'"):
        method_of("var", kep=1)
    with pytest.raises(ValueError, match="unknown method 'digits'"):
        method_of("digits")
