"""The task of slides: its losses, and official weights to start from."""

from pathlib import Path

import pytest
import torch

from medical_seg.models import create_model
from medical_seg.slides.batches import padded
from medical_seg.slides.task import SlideTask


def test_losses_are_summed_and_scores_are_probabilities() -> None:
    task = SlideTask("acmil_ga", in_channels=4, out_channels=3, options={"width": 8, "branches": 2})
    batch = padded([{"features": torch.randn(n, 4), "label": k} for k, n in enumerate((3, 5))])
    assert set(task(mode="loss", **batch)) == {"loss_bag", "loss_branches", "loss_diversity"}
    rows = task.eval()(mode="predict", **batch)
    assert [row["label"] for row in rows] == [0, 1]
    assert all(float(row["scores"].sum().detach()) == pytest.approx(1) for row in rows)
    assert torch.equal(task(mode="tensor", **batch).logits, task.net(batch["features"], batch["mask"]).logits)


def test_training_starts_from_official_weights(tmp_path: Path) -> None:
    options = {"width": 8, "branches": 2}
    source = create_model("acmil_ga", in_channels=4, out_channels=2, **options)
    torch.save({"model": source.state_dict()}, tmp_path / "a.pth")
    task = SlideTask("acmil_ga", in_channels=4, options=options, weights=str(tmp_path / "a.pth"))
    source_state = source.state_dict()
    assert all(torch.equal(value, source_state[name]) for name, value in task.net.state_dict().items())
    three = {"in_channels": 4, "out_channels": 3, "options": options, "weights": str(tmp_path / "a.pth")}
    with pytest.raises(ValueError, match=r"Slide_classifier\.fc\.weight is \(2, 8\), the model has \(3, 8\)"):
        SlideTask("acmil_ga", **three)
    kept = SlideTask("acmil_ga", ignore=["classifier", "Slide_classifier"], **three)
    name = "dimreduction.fc1.weight"
    assert torch.equal(kept.net.get_parameter(name), source.get_parameter(name))
    with pytest.raises(ValueError, match="agunet reads images; slides need a network of bags"):
        SlideTask("agunet", in_channels=1)
