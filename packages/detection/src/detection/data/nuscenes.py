"""nuScenes, read from the tables of its devkit: six cameras, boxes in the LiDAR frame, depth from the LiDAR.

Source: Caesar et al., nuScenes, CVPR 2020, arXiv 1903.11027; tables as https://github.com/nutonomy/nuscenes-devkit
documents them in ``docs/schema_nuscenes.md``. The devkit is not needed; only its lists of scenes are, for ``split``.

A folder holds ``<version>/{scene,sample,sample_data,…}.json`` and the files that ``sample_data`` names. Items are those
of `detection.data.ring3d.Ring3D`, so that every model and metric of that data set runs on this one.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from detection.data.ring3d import CAMERAS

Array = NDArray[np.float64]

TABLES = ("scene", "sample", "sample_data", "sample_annotation", "instance", "category", "calibrated_sensor",
          "ego_pose", "sensor")  # fmt: skip
# the ten classes of the detection task, by the categories that count as them
CLASSES = ("car", "truck", "construction_vehicle", "bus", "trailer", "barrier", "motorcycle", "bicycle", "pedestrian",
           "traffic_cone")  # fmt: skip
CATEGORY_CLASS = {
    "vehicle.car": "car",
    "vehicle.truck": "truck",
    "vehicle.construction": "construction_vehicle",
    "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus",
    "vehicle.trailer": "trailer",
    "movable_object.barrier": "barrier",
    "vehicle.motorcycle": "motorcycle",
    "vehicle.bicycle": "bicycle",
    "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian",
    "movable_object.trafficcone": "traffic_cone",
}
MAX_VELOCITY_SECONDS = 1.5  # between annotations that a velocity may be taken from


def rotation_matrix(quaternion: Sequence[float]) -> Array:
    """Rotation (3, 3) of a quaternion (w, x, y, z), normalized."""
    w, x, y, z = np.asarray(quaternion, dtype=float) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def pose(row: Mapping[str, Any]) -> Array:
    """The 4×4 matrix of a row with ``rotation`` and ``translation``: from its own frame to the frame it stands in."""
    matrix = np.eye(4)
    matrix[:3, :3] = rotation_matrix(row["rotation"])
    matrix[:3, 3] = row["translation"]
    return matrix


class NuScenes(Dataset[dict[str, Any]]):
    """Key frames of nuScenes.

    Args:
        root: the folder. version: the folder of the tables, e.g. ``"v1.0-mini"``.
        split: a list of the devkit (``"train"``, ``"val"``, ``"mini_val"``, …), which must then be installed; None
            takes ``scenes``.
        scenes: names of scenes; None takes all.
        image_size: (height, width) that images are resized to; ``lidar2img`` follows.
        min_points: objects with fewer LiDAR and radar points in all are left out, as in the official evaluation.

    Items: see `detection.data.ring3d.Ring3D`; depth (6, Y, X) holds the nearest LiDAR point of each pixel, 0 elsewhere,
    and is all 0 without LiDAR files.
    Raises: ValueError for a missing table or camera, a split without the devkit, scenes that do not exist, split and
        scenes at once; when an item is read, for an image that is missing or damaged.
    """

    def __init__(
        self,
        root: str | Path,
        version: str = "v1.0-trainval",
        *,
        split: str | None = None,
        scenes: Sequence[str] | None = None,
        image_size: tuple[int, int] = (448, 800),
        min_points: int = 1,
    ) -> None:
        self.root = Path(root)
        self.image_size = (image_size[0], image_size[1])
        self.min_points = min_points
        self.tables = {name: self._read(version, name) for name in TABLES}
        names = {row["name"]: token for token, row in self.tables["scene"].items()}
        if split is not None:
            if scenes is not None:
                raise ValueError("NuScenes: give split or scenes, not both")
            scenes = [name for name in _devkit_scenes(split) if name in names]
        unknown = [name for name in scenes or () if name not in names]
        if unknown:
            raise ValueError(
                f"NuScenes: {self.root / version} has no scene {unknown[0]!r}; it has {', '.join(sorted(names))}"
            )
        self.tokens = [token for name in (scenes or sorted(names)) for token in self._samples(names[name])]
        self._frames = self._key_frames()
        self._annotations: dict[str, list[str]] = {}
        for token, row in self.tables["sample_annotation"].items():
            self._annotations.setdefault(row["sample_token"], []).append(token)
        for token in self.tokens:
            missing = {*CAMERAS, "LIDAR_TOP"} - set(self._frames.get(token, {}))
            if missing:
                raise ValueError(f"NuScenes: sample {token} has no key frame of {', '.join(sorted(missing))}")
        self.metainfo: dict[str, Any] = {"classes": list(CLASSES), "cameras": list(CAMERAS)}

    def _read(self, version: str, name: str) -> dict[str, dict[str, Any]]:
        path = self.root / version / f"{name}.json"
        if not path.is_file():
            raise ValueError(f"NuScenes: {path} is missing; root is the folder that holds {version}/ and samples/")
        try:
            return {row["token"]: row for row in json.loads(path.read_text())}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"NuScenes: {path} is no table of nuScenes: {error}") from None

    def _samples(self, scene: str) -> list[str]:
        tokens, token = [], self.tables["scene"][scene]["first_sample_token"]
        while token:
            tokens.append(token)
            token = self.tables["sample"][token]["next"]
        return tokens

    def _key_frames(self) -> dict[str, dict[str, dict[str, Any]]]:
        """By sample and channel: the row of ``sample_data``."""
        frames: dict[str, dict[str, dict[str, Any]]] = {}
        for row in self.tables["sample_data"].values():
            if row["is_key_frame"]:
                sensor = self.tables["calibrated_sensor"][row["calibrated_sensor_token"]]["sensor_token"]
                frames.setdefault(row["sample_token"], {})[self.tables["sensor"][sensor]["channel"]] = row
        return frames

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        frames = self._frames[self.tokens[index]]
        images, matrices = [], []
        lidar = self._global_pose(frames["LIDAR_TOP"])
        for name in CAMERAS:
            image, scale = self._image(self.root / frames[name]["filename"])
            images.append(image)
            matrices.append(
                scale @ self._intrinsic(frames[name]) @ np.linalg.inv(self._global_pose(frames[name])) @ lidar
            )
        lidar2img = np.stack(matrices)
        boxes, labels = self.objects(index)
        return {
            "image": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255,
            "depth": torch.from_numpy(self._depth(self.root / frames["LIDAR_TOP"]["filename"], lidar2img)),
            "lidar2img": torch.from_numpy(lidar2img).float(),
            "boxes": torch.from_numpy(boxes).float(),
            "labels": torch.from_numpy(labels),
            "index": index,
        }

    def objects(self, index: int) -> tuple[Array, NDArray[np.int64]]:
        """Boxes (N, 9: x, y, z, l, w, h, yaw, vx, vy in the LiDAR frame) and labels (N,) of a sample."""
        token = self.tokens[index]
        to_lidar = np.linalg.inv(self._global_pose(self._frames[token]["LIDAR_TOP"]))
        boxes, labels = [], []
        for name in self._annotations.get(token, ()):
            row = self.tables["sample_annotation"][name]
            category = self.tables["category"][self.tables["instance"][row["instance_token"]]["category_token"]]["name"]
            points = row["num_lidar_pts"] + row.get("num_radar_pts", 0)
            if category not in CATEGORY_CLASS or points < self.min_points:
                continue
            matrix = to_lidar @ pose(row)
            width, length, height = row["size"]
            velocity = to_lidar[:3, :3] @ self._velocity(row)
            yaw = math.atan2(matrix[1, 0], matrix[0, 0])
            boxes.append([*matrix[:3, 3], length, width, height, yaw, *velocity[:2]])
            labels.append(CLASSES.index(CATEGORY_CLASS[category]))
        return np.array(boxes, dtype=float).reshape(-1, 9), np.array(labels, dtype=np.int64)

    def _velocity(self, row: Mapping[str, Any]) -> Array:
        """Between the neighboring annotations, in m/s in the global frame; 0 if there are none close enough."""
        table = self.tables["sample_annotation"]
        first, last = (table[row[side]] if row[side] else row for side in ("prev", "next"))
        seconds = 1e-6 * (
            self.tables["sample"][last["sample_token"]]["timestamp"]
            - self.tables["sample"][first["sample_token"]]["timestamp"]
        )
        allowed = MAX_VELOCITY_SECONDS * (2 if row["prev"] and row["next"] else 1)
        if not 0 < seconds <= allowed:
            return np.zeros(3)
        return (np.array(last["translation"]) - np.array(first["translation"])) / seconds

    def _global_pose(self, frame: Mapping[str, Any]) -> Array:
        """From the sensor's frame to the global one, at the sensor's own time."""
        sensor = self.tables["calibrated_sensor"][frame["calibrated_sensor_token"]]
        return pose(self.tables["ego_pose"][frame["ego_pose_token"]]) @ pose(sensor)

    def _intrinsic(self, frame: Mapping[str, Any]) -> Array:
        matrix = np.eye(4)
        matrix[:3, :3] = self.tables["calibrated_sensor"][frame["calibrated_sensor_token"]]["camera_intrinsic"]
        return matrix

    def _image(self, path: Path) -> tuple[NDArray[np.uint8], Array]:
        """The image (Y, X, 3), and the 4×4 matrix that scales pixels to its size."""
        height, width = self.image_size
        try:
            with Image.open(path) as opened:
                scale = np.diag([width / opened.width, height / opened.height, 1.0, 1.0])
                image = opened.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        except (OSError, UnidentifiedImageError) as error:
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
            raise ValueError(f"NuScenes: {path} {reason}") from None
        return np.asarray(image), scale

    def _depth(self, path: Path, lidar2img: Array) -> NDArray[np.float32]:
        """Depth (6, Y, X) of the nearest LiDAR point in each pixel."""
        height, width = self.image_size
        depth = np.full((len(CAMERAS), height, width), np.inf, np.float32)
        if not path.is_file():
            return np.zeros_like(depth)
        values = np.fromfile(path, np.float32)
        if len(values) % 5:
            raise ValueError(f"NuScenes: {path} holds {len(values)} numbers, no multiple of 5 per LiDAR point")
        points = np.concatenate([values.reshape(-1, 5)[:, :3], np.ones((len(values) // 5, 1))], 1)
        for camera, matrix in enumerate(lidar2img):
            seen = points @ matrix.T
            seen = seen[seen[:, 2] > 1.0]  # nearer ones hit the car itself
            column, row = np.floor(seen[:, :2] / seen[:, 2:3]).astype(int).T
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            np.minimum.at(depth[camera], (row[inside], column[inside]), seen[inside, 2].astype(np.float32))
        return np.where(np.isinf(depth), 0, depth)


def _devkit_scenes(split: str) -> list[str]:
    try:
        from nuscenes.utils.splits import create_splits_scenes  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            f"NuScenes: split={split!r} needs the devkit's lists of scenes: pip install nuscenes-devkit, or give scenes"
        ) from None
    lists = create_splits_scenes()
    if split not in lists:
        raise ValueError(f"NuScenes: the devkit has no split {split!r}; it has {', '.join(sorted(lists))}")
    return lists[split]
