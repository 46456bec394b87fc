"""Grounding on digits: the truth is the cell asked for; losses, scores, pictures; refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vlm_tools.data.digits_world import scene
from vlm_tools.data.grounded_scenes import GroundedScenes, cell_mask, question
from vlm_tools.data.hashed_words import hashed_words
from vlm_tools.data.words import DIGITS
from vlm_tools.digits.grounding import GroundingIoU, GroundingTask, answers, draw_answers, draw_grounded, mask_iou
from vlm_tools.models import create_model


def net(**options: Any) -> Any:
    torch.manual_seed(0)
    return create_model("test_sentence_blocks", **options)


def test_hashed_words_are_unit_vectors_that_order_and_case_do_not_change() -> None:
    texts = hashed_words(["is there a three?", "A three is there", "is there a four", ""], 64)
    assert torch.equal(texts[0], texts[1])
    assert not torch.allclose(texts[0], texts[2])
    torch.testing.assert_close(texts.norm(dim=-1), torch.tensor([1.0, 1, 1, 0]))
    assert hashed_words(["a"], 8).nonzero().tolist() == hashed_words(["a"], 8).nonzero().tolist() != []
    for dim in (48, 96, 384):  # no two digits are asked for by one vector
        assert len({tuple(row.tolist()) for row in hashed_words([question(name) for name in DIGITS], dim)}) == 10
    with pytest.raises(ValueError, match=r"^hashed_words: dim must be at least 1, got dim=0"):
        hashed_words([], 0)
    with pytest.raises(ValueError, match=r"^hashed_words: texts must be a list of texts, got the text 'a three'"):
        hashed_words("a three")


def test_the_truth_is_the_cell_of_the_digit_that_is_asked_for() -> None:
    data = GroundedScenes("test", 20, start=7, text_dim=48)
    for index in range(20):
        item, shown = data[index], scene("test", 7 + index)
        assert item["digit"] in shown.digits
        assert torch.equal(item["text"], hashed_words([question(DIGITS[item["digit"]])], 48)[0])
        row, column = divmod(shown.cells.index(item["digit"]), 4)
        assert item["mask"].sum() == item["mask"][0, 9 * row : 9 * row + 9, 9 * column : 9 * column + 9].sum() == 81
        assert torch.equal(item["image"][2], torch.from_numpy(shown.image))
    assert len({data[index]["digit"] for index in range(20)}) > 3
    assert len(data) == 20
    assert not torch.equal(data[0]["image"], GroundedScenes("val", 1, start=7)[0]["image"])
    assert not bool(cell_mask((10,) * 16, 3).any())
    with pytest.raises(ValueError, match=r"^GroundedScenes: count must be at least 1 and start not negative"):
        GroundedScenes("test", 0)


def test_iou_counts_pixels() -> None:
    truth = torch.zeros(3, 1, 4, 4, dtype=torch.bool)
    truth[0, :, :2] = truth[1, :, :2] = True
    found = torch.zeros_like(truth)
    found[0, :, 1:3] = True
    assert mask_iou(found, truth).tolist() == pytest.approx([1 / 3, 0.0, 1.0])
    with pytest.raises(ValueError, match=r"^mask_iou: both masks must be bool and of one shape"):
        mask_iou(found.float(), truth)  # type: ignore[arg-type]


def batch(count: int = 3) -> dict[str, Any]:
    data = GroundedScenes("test", count, text_dim=48)
    return torch.utils.data.default_collate([data[n] for n in range(count)])


def test_losses_and_scores_follow_their_options() -> None:
    inputs = batch()
    task = GroundingTask(net()).eval()
    loss = task.loss(**inputs)["loss"]
    logits = task.tensor(**inputs)
    truth = inputs["mask"]
    expected = -(truth * logits.sigmoid().log() + (1 - truth) * (1 - logits.sigmoid()).log()).mean()
    torch.testing.assert_close(loss, expected)
    weighted = GroundingTask(net(), positive_weight=3.0).eval().loss(**inputs)["loss"]
    torch.testing.assert_close(weighted - loss, -2 * (truth * logits.sigmoid().log()).mean())
    metric = GroundingIoU()
    metric.process(None, [{"iou": 0.4, "hit": True}, {"iou": 0.8, "hit": False}])
    assert metric.compute_metrics(metric.results) == pytest.approx({"iou": 0.6, "iou_above_half": 0.5, "pointing": 0.5})
    with torch.no_grad():
        task.net.classifier.weight.zero_()
        torch.nn.init.constant_(task.net.get_parameter("classifier.bias"), 0.5)
        loose, strict = task.predict(**inputs), GroundingTask(task.net, threshold=0.9).predict(**inputs)
    assert loose[0]["iou"] == pytest.approx(1 / 16)
    assert strict[0]["iou"] == 0.0
    assert loose[0]["probability"].shape == (36, 36)


def test_the_truth_itself_scores_one_and_pictures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch()
    task = GroundingTask(net()).eval()
    monkeypatch.setattr(task.net, "forward", lambda image, text: 8 * inputs["mask"] - 4)  # noqa: ARG005
    assert all(row["iou"] == 1.0 and row["hit"] for row in task.predict(**inputs))
    draw_grounded(task, [inputs], tmp_path / "grounded.png", count=2)
    with Image.open(tmp_path / "grounded.png") as drawn:
        assert drawn.width > 400
    shown = Image.new("RGB", (50, 40))
    heat = answers(net().eval(), shown)
    assert heat.shape == (10, 36, 36)
    heat[:] = 0.2
    heat[3, 0, 0] = 0.7
    assert draw_answers(shown, heat, tmp_path / "answers.png") == ["three"]
    assert draw_answers(shown, heat, tmp_path / "answers.png", threshold=0.8) == []


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"^GroundingTask: positive_weight must be positive, got positive_weight=0"):
        GroundingTask(net(), positive_weight=0)
    with pytest.raises(ValueError, match=r"^GroundingTask: threshold must lie in \(0, 1\), got threshold=1"):
        GroundingTask(net(), threshold=1)
    with pytest.raises(ValueError, match=r"^GroundingTask: one mask is trained, got a network with num_classes=2"):
        GroundingTask(net(num_classes=2))
