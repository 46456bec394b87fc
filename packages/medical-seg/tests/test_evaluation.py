"""Losses, scores, windows."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medical_seg.evaluation import compare, patient_table, summarize
from medical_seg.losses import DiceCE
from medical_seg.predictions import largest_parts, parse_memory
from medical_seg.sliding_window import gaussian, labels_from_planes, logits_by_planes, window_starts


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI calls itself with it
def test_scores_are_monai_s() -> None:
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.meandice import compute_dice
    from monai.metrics.surface_dice import compute_surface_dice
    from monai.metrics.surface_distance import compute_average_surface_distance

    rng = np.random.default_rng(0)
    spacing = (2.0, 1.0, 0.5)
    truth = np.zeros((9, 12, 14), bool)
    truth[2:6, 3:9, 2:11] = True
    found = np.roll(truth, 1, 1) ^ (rng.random(truth.shape) < 0.02)
    ours = compare(found, truth, spacing, tolerance=1.0)
    a, b = (torch.from_numpy(x)[None, None] for x in (found, truth))
    assert ours["Dice"] == pytest.approx(float(compute_dice(a, b)))
    assert ours["HD95"] == pytest.approx(float(compute_hausdorff_distance(a, b, percentile=95, spacing=spacing)))
    asd = compute_average_surface_distance(a, b, symmetric=True, spacing=spacing)
    assert ours["ASSD"] == pytest.approx(float(asd), rel=1e-5)
    nsd = compute_surface_dice(a, b, [1.0], spacing=spacing)
    assert ours["NSD"] == pytest.approx(float(nsd), rel=1e-5)


def test_absent_classes_follow_one_rule() -> None:
    some, none = np.ones((2, 3, 3), bool), np.zeros((2, 3, 3), bool)
    both = compare(none, none, (1, 1, 1))
    assert all(np.isnan(both[key]) for key in ("Dice", "IoU", "HD95", "ASSD", "NSD"))
    one = compare(none, some, (1, 1, 1))
    assert (one["Dice"], one["IoU"], one["NSD"]) == (0, 0, 0)
    assert np.isinf([one["HD95"], one["ASSD"]]).all()
    with pytest.raises(ValueError, match=r"shapes \(2, 3, 3\) and \(1, 3, 3\) differ"):
        compare(some, some[:1], (1, 1, 1))


def test_macro_and_micro_and_the_patients_table_by_hand() -> None:
    def row(case: str, tp: int, fp: int, fn: int) -> dict[str, Any]:
        found, truth = np.zeros((1, 1, 100), bool), np.zeros((1, 1, 100), bool)
        truth[..., : tp + fn] = True
        found[..., fn : fn + tp + fp] = True
        return {"case": case, "label": 1, **compare(found, truth, (10, 10, 10))}

    rows = [
        row("a", 8, 0, 0),
        row("b", 1, 1, 1),
        row("c", 0, 0, 4),
        row("d", 0, 2, 0),
        row("e", 0, 0, 0),
        row("f", 4, 0, 4),
    ]
    patients = [{key: r[key] for key in ("Dice", "ml_pred", "ml_ref")} for r in rows]
    summary = summarize(rows, patients, by_volume=3.0)
    mean = summary["mean"]["1"]
    assert mean["Dice"] == pytest.approx(np.mean([1, 0.5, 0, 0, 2 / 3]))
    assert mean["Dice_micro"] == pytest.approx(26 / 38)
    assert (mean["n"], mean["infinite_distances"]) == (5, 2)
    whole = summary["patients"]["all"]
    assert [whole[k] for k in ("TP", "FN", "FP", "TN")] == [3, 1, 1, 1]
    assert (whole["recall"], whole["precision"], whole["F1"]) == (0.75, 0.75, 0.75)
    small = summary["patients"]["truth below 3 ml"]
    assert (small["n"], small["TP"]) == (1, 1)
    patients = [{"Dice": 0.5, "ml_pred": 1.0, "ml_ref": 1.0}]
    assert patient_table(patients, overlap=0.5)["recall"] == 0
    assert patient_table(patients)["specificity"] == 1


def test_a_small_lesion_receives_a_gradient_where_the_official_loss_gives_none() -> None:
    logits = torch.zeros(1, 2, 32, 32)
    logits[:, 1] = -2.197  # foreground probability 0.1 everywhere
    target = torch.zeros(1, 32, 32, dtype=torch.long)
    target[0, 0, :2] = 1
    gradients = {}
    for dice in ("foreground", "official"):
        x = logits.clone().requires_grad_()
        DiceCE(dice=dice, ce_weight=0)(x, target).backward()
        assert x.grad is not None
        gradients[dice] = float(x.grad.abs().max())
    assert gradients["official"] == 0
    assert gradients["foreground"] > 0
    with pytest.raises(ValueError, match="dice must be 'foreground' or 'official', got dice='x'"):
        DiceCE(dice="x")  # pyright: ignore


def test_the_loss_is_dice_and_cross_entropy() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64).float()
    target = torch.randint(0, 3, (2, 4, 5))
    flat, t = logits.movedim(1, -1).reshape(-1, 3), target.reshape(-1)
    p, onehot = flat.softmax(-1), F.one_hot(t, 3).float()
    dice = ((2 * (p * onehot).sum(0) + 1) / (p.sum(0) + onehot.sum(0) + 1))[1:].mean()
    expected = 2 * (1 - dice) + 3 * F.cross_entropy(flat, t)
    assert torch.allclose(DiceCE(dice_weight=2, ce_weight=3)(logits, target), expected)
    squared = ((2 * (p * onehot).sum(0) + 1) / ((p * p).sum(0) + onehot.sum(0) + 1))[1:].mean()
    assert torch.allclose(DiceCE(ce_weight=0, squared=True)(logits, target), 1 - squared)


def network(x: Tensor) -> Tensor:
    """Depends on the place in the window, as a network with padding does."""
    ramp = torch.linspace(0.5, 1.5, x.shape[-1])
    return torch.cat([x * ramp, -x, x.square() - 1], 1)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("grid", [(9, 10, 7), (3, 4, 20)])
def test_streamed_labels_equal_the_argmax_of_everything(grid: tuple[int, ...], mirror: bool) -> None:
    torch.manual_seed(0)
    image = torch.randn(1, *grid)
    window, written = (4, 6, 4), (13, 8, 11)

    def read(start: tuple[int, ...]) -> Tensor:
        padded = F.pad(image, [0, 8, 0, 8, 0, 8])
        return padded[(slice(None), *(slice(a, a + n) for a, n in zip(start, window, strict=True)))]

    total, weight = torch.zeros(3, *(n + 8 for n in grid)), torch.zeros(*(n + 8 for n in grid))
    for z in window_starts(grid[0], 4, 0.5):
        for y in window_starts(grid[1], 6, 0.5):
            for x in window_starts(grid[2], 4, 0.5):
                part = read((z, y, x))[None]
                flips = [[a for a in (2, 3, 4) if bits >> a & 1] for bits in range(0, 32, 4)] if mirror else [[]]
                logits = torch.stack([network(part.flip(f)).flip(f) for f in flips]).mean(0)[0]
                place = (slice(z, z + 4), slice(y, y + 6), slice(x, x + 4))
                total[(slice(None), *place)] += logits * gaussian(window)
                weight[place] += gaussian(window)
    whole = (total / weight)[:, : grid[0], : grid[1], : grid[2]]
    planes = list(logits_by_planes(network, read, grid, window, 3, mirror=mirror))
    assert torch.allclose(torch.cat(planes, 1), whole, atol=1e-5)
    expected = F.interpolate(whole[None], size=written, mode="trilinear")[0].argmax(0)
    found = torch.stack([labels for _, labels in labels_from_planes(iter(planes), grid[0], written)])
    assert (found == expected).float().mean() > 0.999


def test_the_largest_part_of_each_class_stays() -> None:
    mask = np.zeros((1, 5, 9), np.uint8)
    mask[0, 0, :4] = 1
    mask[0, 4, 5:7] = 1
    mask[0, 2, 8] = 2
    assert np.unique(largest_parts(mask), return_counts=True)[1].tolist() == [40, 4, 1]


def test_sizes_of_memory_are_binary() -> None:
    assert parse_memory("1.5G") == 3 * 2**29
    assert parse_memory("800 MiB") == 800 * 2**20
