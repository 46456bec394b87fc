"""The nuScenes reader on a hand-made folder of tables: one scene, two samples, one car and a tree."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection.data.nuscenes import CLASSES, NuScenes, rotation_matrix
from detection.data.ring3d import CAM2LIDAR, CAMERAS, INTRINSIC, LIDAR2IMG, collate_scenes


def quaternion(matrix: np.ndarray) -> list[float]:
    """(w, x, y, z) of a rotation, by its eigenvector: independent of the reader's formula."""
    q = np.array(
        [
            [matrix[0, 0] + matrix[1, 1] + matrix[2, 2], 0, 0, 0],
            [matrix[2, 1] - matrix[1, 2], matrix[0, 0] - matrix[1, 1] - matrix[2, 2], 0, 0],
            [matrix[0, 2] - matrix[2, 0], matrix[1, 0] + matrix[0, 1], matrix[1, 1] - matrix[0, 0] - matrix[2, 2], 0],
            [
                matrix[1, 0] - matrix[0, 1],
                matrix[2, 0] + matrix[0, 2],
                matrix[2, 1] + matrix[1, 2],
                matrix[2, 2] - matrix[0, 0] - matrix[1, 1],
            ],
        ]
    )
    _, vectors = np.linalg.eigh((q + q.T - np.diag(np.diag(q))) / 3)
    return vectors[:, -1].tolist()


def turn(yaw: float) -> list[float]:
    return [math.cos(yaw / 2), 0, 0, math.sin(yaw / 2)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The car drives 10 m/s along its heading; the ego stands at (100, 50), turned by 90°; LiDAR 1.8 m above it."""
    (tmp_path / "v1.0-toy").mkdir()
    (tmp_path / "samples").mkdir()
    channels = ["LIDAR_TOP", *CAMERAS]
    lidar = {"translation": [0, 0, 1.8], "rotation": turn(0)}
    sensors = {"LIDAR_TOP": {**lidar, "camera_intrinsic": []}}
    for i, name in enumerate(CAMERAS):
        position = CAM2LIDAR[i, :3, 3] + [0, 0, 1.8]
        rotation = quaternion(CAM2LIDAR[i, :3, :3])
        intrinsic = np.diag([2, 2, 1]) @ INTRINSIC  # images of 320×192
        sensors[name] = {"translation": position.tolist(), "rotation": rotation, "camera_intrinsic": intrinsic.tolist()}
    tables: dict[str, list[dict]] = {
        "scene": [{"token": "s", "name": "scene-0001", "first_sample_token": "a"}],
        "sample": [
            {"token": "a", "next": "b", "prev": "", "timestamp": 0},
            {"token": "b", "next": "", "prev": "a", "timestamp": 500_000},
        ],
        "category": [{"token": "car", "name": "vehicle.car"}, {"token": "tree", "name": "static.tree"}],
        "instance": [{"token": "i", "category_token": "car"}, {"token": "j", "category_token": "tree"}],
        "sensor": [{"token": name, "channel": name} for name in channels],
        "calibrated_sensor": [{"token": f"c{n}", "sensor_token": n, **sensors[n]} for n in channels],
        "ego_pose": [{"token": "e", "translation": [100, 50, 0], "rotation": turn(math.pi / 2)}],
        "sample_data": [],
        "sample_annotation": [],
    }
    for i, sample in enumerate("ab"):
        for name in channels:
            file = f"samples/{sample}_{name}" + (".bin" if name == "LIDAR_TOP" else ".png")
            tables["sample_data"].append({
                "token": sample + name, "sample_token": sample, "is_key_frame": True, "filename": file,
                "calibrated_sensor_token": f"c{name}", "ego_pose_token": "e",
            })  # fmt: skip
            if name == "LIDAR_TOP":
                np.array([[0, 10, 0, 0, 0], [0.3, 8, 0.2, 0, 0]], np.float32).tofile(tmp_path / file)
            else:
                Image.fromarray(np.full((192, 320, 3), 51, np.uint8)).save(tmp_path / file)
        for kind in "ij":
            tables["sample_annotation"].append({
                "token": sample + kind, "sample_token": sample, "instance_token": kind, "size": [1.9, 4.5, 1.6],
                # 10 m ahead of the ego, i.e. at global (90, 50); heading along the ego's back, global −y, and 0.1 more
                "translation": [90.0, 50.0 - 5 * i, 0.8], "rotation": turn(-math.pi / 2 - 0.1), "num_lidar_pts": 3,
                "num_radar_pts": 2,
                "prev": "a" + kind if i else "", "next": "" if i else "b" + kind,
            })  # fmt: skip
    for name, rows in tables.items():
        (tmp_path / "v1.0-toy" / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


def test_boxes_come_in_the_lidar_frame_with_velocity(root: Path) -> None:
    data = NuScenes(root, "v1.0-toy", image_size=(96, 160))
    assert len(data) == 2
    item = data[0]
    # ego's x axis is LiDAR's x here: global −x is 10 m to the ego's left (+y)
    np.testing.assert_allclose(item["boxes"].numpy(), [[0, 10, -1, 4.5, 1.9, 1.6, math.pi - 0.1, -10, 0]], atol=1e-5)
    assert [CLASSES[label] for label in item["labels"]] == ["car"]


def test_cameras_and_depth_follow_the_resized_images(root: Path) -> None:
    item = NuScenes(root, "v1.0-toy", image_size=(96, 160))[0]
    np.testing.assert_allclose(item["lidar2img"].numpy(), LIDAR2IMG, atol=1e-3)
    assert item["image"].unique().tolist() == pytest.approx([0.2])
    seen = LIDAR2IMG[0] @ [0.3, 8, 0.2, 1]
    u, v, t = int(seen[0] / seen[2]), int(seen[1] / seen[2]), seen[2]
    assert item["depth"][0, v, u].item() == pytest.approx(t, abs=1e-3)
    assert (item["depth"][0] > 0).sum() <= 2
    assert item["depth"][3].sum() == 0


def test_items_batch_like_ring3d(root: Path) -> None:
    data = NuScenes(root, "v1.0-toy", scenes=["scene-0001"], image_size=(96, 160))
    batch = collate_scenes([data[0], data[1]])
    assert batch["image"].shape == (2, 6, 3, 96, 160)


def test_few_points_and_missing_lidar_are_handled(root: Path) -> None:
    assert [len(NuScenes(root, "v1.0-toy", min_points=points).objects(0)[0]) for points in (5, 6)] == [1, 0]
    (root / "samples" / "a_LIDAR_TOP.bin").unlink()
    assert NuScenes(root, "v1.0-toy", image_size=(96, 160))[0]["depth"].sum() == 0


def test_mistakes_are_named(root: Path) -> None:
    with pytest.raises(ValueError, match=r"scene\.json is missing; root is the folder"):
        NuScenes(root, "v1.0-mini")
    with pytest.raises(ValueError, match="has no scene 'scene-9'; it has scene-0001"):
        NuScenes(root, "v1.0-toy", scenes=["scene-9"])
    with pytest.raises(ValueError, match="give split or scenes, not both"):
        NuScenes(root, "v1.0-toy", split="val", scenes=["scene-0001"])
    with pytest.raises(ValueError, match="split='val' needs the devkit's lists of scenes"):
        NuScenes(root, "v1.0-toy", split="val")
    (root / "samples" / "a_CAM_BACK.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a_CAM_BACK\.png cannot be read"):
        NuScenes(root, "v1.0-toy")[0]
    (root / "samples" / "a_CAM_BACK.png").unlink()
    with pytest.raises(ValueError, match=r"a_CAM_BACK\.png is missing"):
        NuScenes(root, "v1.0-toy")[0]
    np.zeros(7, np.float32).tofile(root / "samples" / "b_LIDAR_TOP.bin")
    with pytest.raises(ValueError, match="holds 7 numbers, no multiple of 5"):
        NuScenes(root, "v1.0-toy")[1]
    rows = json.loads((root / "v1.0-toy" / "sample_data.json").read_text())
    (root / "v1.0-toy" / "sample_data.json").write_text(
        json.dumps([r for r in rows if "CAM_FRONT_LEFT" not in r["token"]])
    )
    with pytest.raises(ValueError, match="sample a has no key frame of CAM_FRONT_LEFT"):
        NuScenes(root, "v1.0-toy")
    (root / "v1.0-toy" / "sensor.json").write_text("[1")
    with pytest.raises(ValueError, match=r"sensor\.json is no table of nuScenes"):
        NuScenes(root, "v1.0-toy")


def test_rotation_turns_x_into_y() -> None:
    np.testing.assert_allclose(rotation_matrix(turn(math.pi / 2)) @ [1, 0, 0], [0, 1, 0], atol=1e-12)
