"""ring3d: the generator's reference values, its geometry, and what the data set hands out."""

import math

import numpy as np
import pytest
import torch

from detection.data.ring3d import (
    CAM2LIDAR,
    CAMERAS,
    CLASSES,
    INTRINSIC,
    LIDAR2IMG,
    Ring3D,
    boxes_at,
    collate_scenes,
    make_scene,
    record,
    sparse,
)


def test_scenes_are_those_of_the_published_numbers() -> None:
    """The numbers say which data measurements belong to: numpy's legacy stream may not change them."""
    labels = [make_scene(i).labels for i in range(50)]
    train = np.bincount(np.concatenate(labels[:40]), minlength=3)
    assert train.tolist() == [242, 52, 97]
    assert np.bincount(np.concatenate(labels), minlength=3).tolist() == [288, 70, 119]
    assert [len(labels[i]) for i in range(3)] == [11, 7, 7]
    expected = [
        [-6.495, -2.325, -0.986, 4.818, 1.778, 1.628, -2.626],
        [4.698, -2.273, -1.058, 4.831, 1.819, 1.484, 1.759],
    ]
    np.testing.assert_allclose(make_scene(0).boxes[:2], expected, atol=6e-4)


def test_depth_and_image_agree_with_the_projection_of_boxes() -> None:
    sample = record(0, 0)
    depths = np.stack([sample["cams"][name]["depth"] for name in CAMERAS]) / 256
    assert 0.4 < (depths > 0).mean() < 0.6
    found = 0
    for box, pixels in zip(sample["gt_boxes"], sample["num_pixels"], strict=True):
        if pixels < 500:
            continue
        seen = LIDAR2IMG @ np.array([*box[:3], 1])
        for camera in np.flatnonzero(seen[:, 2] > 1):
            u, v, t = seen[camera, 0] / seen[camera, 2], seen[camera, 1] / seen[camera, 2], seen[camera, 2]
            if 0 <= u < 160 and 0 <= v < 96:
                # the surface lies in front of the center, by half the diagonal at most
                gap = t - depths[camera, int(v), int(u)]
                found += -0.01 <= gap <= np.linalg.norm(box[3:6]) / 2
    assert found >= 3
    ground = sample["cams"]["CAM_FRONT"]["depth"][95, 80] / 256
    assert ground == pytest.approx((1.8 - 0.3) / (47.5 / INTRINSIC[1, 1]), abs=1 / 256)


def test_cameras_look_around_in_order() -> None:
    assert CAM2LIDAR[0, :3, 2] == pytest.approx([0, 1, 0])  # forward
    assert CAM2LIDAR[1, 0, 2] > 0  # front right looks to +x
    assert INTRINSIC[0, 0] == pytest.approx(114.25, abs=0.01)
    assert np.linalg.det(CAM2LIDAR[:, :3, :3]) == pytest.approx(np.ones(6))


def test_standing_objects_turn_and_fall_behind_as_the_car_moves() -> None:
    scene = make_scene(0)
    still = np.flatnonzero(np.abs(scene.velocity).sum(1) == 0)
    first, second = boxes_at(scene, 0)[0][still], boxes_at(scene, 1)[0][still]
    turn = (first[:, 6] - second[:, 6] + math.pi) % (2 * math.pi) - math.pi
    np.testing.assert_allclose(turn, math.radians(1))
    moved = first[:, :2] - [0, 0.5]
    np.testing.assert_allclose(np.hypot(*moved.T), np.hypot(*second[:, :2].T))


def test_sparse_depth_keeps_the_same_twentieth_of_the_pixels() -> None:
    depth = np.full((96, 160), 1000, np.uint16)
    kept = sparse(depth, 3, 1, 2)
    assert 0.04 < (kept > 0).mean() < 0.06
    np.testing.assert_array_equal(kept, sparse(depth, 3, 1, 2))


def test_mirrored_sample_projects_boxes_onto_their_pixels() -> None:
    data = Ring3D("train", scenes=1, mirror=True)
    plain = Ring3D("train", scenes=1)[0]
    mirrored = next(item for item in (data[0] for _ in range(50)) if not torch.equal(item["boxes"], plain["boxes"]))
    cars = mirrored["boxes"].double()
    for item in (plain, mirrored):
        assert item["image"].shape == (6, 3, 96, 160)
        seen = torch.einsum(
            "kij,nj->kni", item["lidar2img"], torch.nn.functional.pad(item["boxes"][:, :3], (0, 1), value=1.0)
        )
        u, v, t = seen[..., 0] / seen[..., 2], seen[..., 1] / seen[..., 2], seen[..., 2]
        camera, box = ((t > 1) & (u > 0) & (u < 160) & (v > 0) & (v < 96)).nonzero(as_tuple=True)
        surface = item["depth"][camera, v[camera, box].long(), u[camera, box].long()]
        hidden = t[camera, box] - surface > item["boxes"][box, 3:6].norm(dim=1)
        assert ((t[camera, box] - surface)[~hidden] > -0.01).all()
        assert (~hidden).sum() >= 3
    np.testing.assert_allclose(cars[:, 0], -plain["boxes"][:, 0])


def test_batches_keep_objects_of_each_sample_apart() -> None:
    data = Ring3D("val", scenes=1, depth="sparse")
    batch = collate_scenes([data[0], data[1]])
    assert batch["image"].shape == (2, 6, 3, 96, 160)
    assert [len(b) for b in batch["boxes"]] == [len(k) for k in batch["labels"]]
    assert (data[0]["depth"] > 0).float().mean() < 0.06
    assert data.metainfo["classes"] == list(CLASSES)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="split must be 'train' or 'val', got split='test'"):
        Ring3D("test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="depth must be 'dense' or 'sparse', got depth='lidar'"):
        Ring3D(depth="lidar")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scenes must be 1…10 in split 'val', got scenes=11"):
        Ring3D("val", scenes=11)
