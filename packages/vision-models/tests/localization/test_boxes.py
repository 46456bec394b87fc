"""Boxes of maps, their measures, and the pictures whose boxes are known."""

from typing import Any

import pytest
import torch

from vision_models.data.pasted_digits import INK, PastedDigits
from vision_models.localization.boxes import components, iou, largest_boxes, scaled
from vision_models.localization.metrics import Localization
from vision_models.localization.task import LocalizationTask

NET: dict[str, Any] = {"type": "vision_models.localization.sat.SAT", "depth": 2, "embed_dim": 16, "num_heads": 2,
                       "img_size": 64, "patch_size": 16, "in_chans": 1, "num_classes": 10, "last_k": 1}  # fmt: skip


def test_the_box_is_that_of_the_largest_connected_part() -> None:
    maps = torch.zeros(3, 10, 12)
    maps[0, 2:5, 3:9] = 1.0  # 18 places
    maps[0, 7:10, 0:5] = 0.9  # 15, apart
    maps[1, 1:3, 1:3] = 1.0
    maps[1, 3:6, 3:6] = 1.0  # touches by a corner
    assert largest_boxes(maps, 0.5).tolist() == [[3, 2, 9, 5], [1, 1, 6, 6], [0, 0, 12, 10]]
    maps[0, 7:10, 0:7] = 0.9  # now 21
    assert largest_boxes(maps, 0.5)[0].tolist() == [0, 7, 7, 10]
    assert largest_boxes(maps, 0.95)[0].tolist() == [3, 2, 9, 5]


def test_parts_are_counted_along_a_winding_path() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]])
    assert len(components(mask[None].bool()).unique()) == 2  # the path and the outside
    mask[4, 2] = 0
    assert len(components(mask[None].bool()).unique()) == 3


def test_maps_are_scaled_each_for_itself() -> None:
    maps = torch.stack([torch.linspace(2, 4, 6).view(2, 3), torch.full((2, 3), 7.0)])
    out = scaled(maps, (2, 3))
    assert out[0].max().item() == pytest.approx(1, abs=1e-4)
    assert out[0].min().item() == 0
    assert out[1].abs().max().item() == 0
    assert scaled(maps, (8, 9)).shape == (2, 8, 9)


@pytest.mark.parametrize(
    ("box", "other", "expected"),
    [
        ([0, 0, 4, 4], [0, 0, 4, 4], 1.0),
        ([0, 0, 4, 4], [2, 2, 6, 6], 4 / 28),
        ([0, 0, 2, 2], [2, 0, 4, 2], 0.0),
        ([0, 0, 2, 4], [0, 0, 4, 4], 0.5),
    ],
)
def test_overlap_is_the_common_share(box: list[int], other: list[int], expected: float) -> None:
    assert iou(torch.tensor(box), torch.tensor(other)).item() == pytest.approx(expected)


def sample(scores: list[float], label: int, box: list[int], truth: list[list[int]]) -> dict[str, Any]:
    found = torch.zeros(20, 20)
    found[box[1] : box[3], box[0] : box[2]] = 1.0
    return {"scores": torch.tensor(scores), "label": label, "map": found, "boxes": torch.tensor(truth)}


def test_shares_count_classes_and_overlaps() -> None:
    metric = Localization(thresholds=(0.5,))
    metric.process(
        None,
        [
            sample([0.9, 0.1], 0, [2, 2, 12, 12], [[2, 2, 12, 12]]),  # both right
            sample([0.9, 0.1], 1, [2, 2, 12, 12], [[0, 0, 1, 1], [2, 2, 12, 12]]),  # wrong class, second box
            sample([0.9, 0.1], 0, [2, 2, 12, 12], [[2, 2, 12, 6]]),  # .4
            sample([0.9, 0.1], 0, [2, 2, 12, 12], [[2, 2, 12, 8]]),  # .6
        ],
    )
    found = metric.compute_metrics(metric.results)
    assert found["gt_known"] == pytest.approx(0.75)
    assert found["top1_loc"] == pytest.approx(0.5)
    assert found["top5_loc"] == pytest.approx(0.75)
    assert found["accuracy"] == pytest.approx(0.75)
    assert found["max_box_acc_v2"] == pytest.approx((1.0 + 0.75 + 0.5) / 3)
    assert metric.compute_metrics([]) == {}


def test_the_threshold_is_the_best_of_those_that_were_given() -> None:
    wide = {"scores": torch.tensor([1.0, 0.0]), "label": 0, "boxes": torch.tensor([[5, 5, 10, 10]])}
    found = torch.zeros(20, 20)
    found[2:18, 2:18] = 0.35
    found[5:10, 5:10] = 1.0
    results = {}
    for thresholds in ((0.3,), (0.4,), (0.3, 0.4)):
        metric = Localization(thresholds=thresholds)
        metric.process(None, [{**wide, "map": found}])
        results[thresholds] = metric.compute_metrics(metric.results)
    assert [results[t]["gt_known"] for t in results] == [0, 1, 1]
    assert results[(0.3, 0.4)]["threshold"] == 0.4
    with pytest.raises(ValueError, match=r"Localization: thresholds must lie in \[0, 1\), got thresholds=\(1.5,\)"):
        Localization((1.5,))
    with pytest.raises(ValueError, match=r"Localization: step must lie in \(0, 0.5\], got step=0"):
        Localization(step=0)


def test_pasted_digits_have_their_ink_in_the_box_and_are_fixed_for_tests() -> None:
    data = PastedDigits("test", specks=0)
    assert len(data) == 359
    for index in (0, 7, 100):
        item = data[index]
        left, top, right, bottom = item["boxes"][0].tolist()
        assert 0 <= left < right <= 64
        assert 0 <= top < bottom <= 64
        ink = (item["image"][0] + 1) / 2 > INK
        outside = ink.clone()
        outside[top:bottom, left:right] = False
        assert not outside.any()
        assert ink[top:bottom, left:right].any(0).all()
        assert torch.equal(item["image"], data[index]["image"])
    train = PastedDigits("train")
    assert not torch.equal(train[0]["image"], train[0]["image"])
    small = PastedDigits("test", smallest=10, largest=10)[3]["boxes"][0]
    assert (small[2:] - small[:2]).max() <= 10
    assert not torch.equal(PastedDigits("test", specks=9)[0]["image"], data[0]["image"])
    with pytest.raises(ValueError, match=r"PastedDigits: 8 <= smallest <= largest <= 64 must hold, got smallest=30"):
        PastedDigits(smallest=30, largest=20)


@pytest.mark.parametrize("kind", ["token", "cam", "rollout"])
def test_the_task_learns_from_labels_and_predicts_maps(kind: Any) -> None:
    task = LocalizationTask(NET, map=kind, area=0.2)
    items = [PastedDigits("train")[i] for i in range(4)]
    batch = {
        "image": torch.stack([item["image"] for item in items]),
        "label": torch.tensor([item["label"] for item in items]),
        "boxes": torch.stack([item["boxes"] for item in items]),
    }
    losses = task.loss(**batch)
    assert list(losses) == ["loss_class", "loss_area", "loss_norm"]
    with torch.no_grad():
        rows = task.eval().predict(**batch)
    assert rows[1]["map"].shape == (64, 64)
    assert torch.equal(rows[1]["boxes"], items[1]["boxes"])
    assert rows[1]["label"] == items[1]["label"]
    metric = Localization()
    metric.process(None, rows)
    assert set(metric.compute_metrics(metric.results)) >= {"gt_known", "top1_loc", "max_box_acc_v2"}


def test_weights_of_losses_count_and_a_network_without_gates_has_none() -> None:
    torch.manual_seed(0)
    image, label = torch.randn(2, 1, 64, 64), torch.tensor([1, 2])
    losses = []
    variants: list[dict[str, Any]] = [{}, {"area_weight": 2.0, "norm_weight": 3.0, "label_smoothing": 0.2}]
    for options in variants:
        torch.manual_seed(0)
        losses.append({n: v.item() for n, v in LocalizationTask(NET, **options).loss(image, label).items()})
    assert losses[1]["loss_area"] == pytest.approx(2 * losses[0]["loss_area"])
    assert losses[1]["loss_norm"] == pytest.approx(3 * losses[0]["loss_norm"])
    assert losses[1]["loss_class"] != pytest.approx(losses[0]["loss_class"], abs=1e-6)
    bare = LocalizationTask({**NET, "last_k": 0}, map="cam")
    assert list(bare.loss(image, label)) == ["loss_class"]
    with pytest.raises(ValueError, match="map='token' needs a network with last_k>0; use map='cam'"):
        LocalizationTask({**NET, "last_k": 0})
    with pytest.raises(ValueError, match="map must be 'token', 'cam' or 'rollout', got map='grad'"):
        LocalizationTask(NET, map="grad")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"area must lie in \(0, 1\), got area=1.5"):
        LocalizationTask(NET, area=1.5)


def test_area_loss_reaches_its_target_on_a_toy_run() -> None:
    task = LocalizationTask(NET, area=0.2, norm_weight=0.0)
    image, label = torch.randn(8, 1, 64, 64), torch.arange(8)
    optimizer = torch.optim.Adam(task.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        sum(task.loss(image, label).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    found = task.net.located(image).map
    assert found is not None
    assert found.mean().item() == pytest.approx(0.2, abs=0.05)
