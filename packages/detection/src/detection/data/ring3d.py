"""ring3d: synthetic street scenes seen by six cameras around a car, with exact depth; made on the spot, no download.

Frame of boxes: the car's LiDAR, x right, y forward, z up, meters, 1.8 m above the ground. A box is
(x, y, z, l, w, h, yaw): its center, its length along yaw. Cameras as in nuScenes: 160×96 pixels, 70° wide, pixel
centers at +0.5.
``lidar2img`` (4×4) maps (x, y, z, 1) to (u·t, v·t, t, 1), where t is the depth along the camera's axis.

Scenes 0–39 train, 40–49 validate, four frames each: 160 and 40 samples of six images.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import NDArray
from torch.utils.data import Dataset

Array = NDArray[np.float64]

CLASSES = ("car", "truck", "pedestrian")
CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT")
CAMERA_YAW = (0.0, -60.0, -120.0, 180.0, 120.0, 60.0)  # degrees, positive to the left
WIDTH, HEIGHT, FIELD_OF_VIEW = 160, 96, 70.0
GROUND = -1.8
FRAMES = 4
FRAME_SECONDS = 0.5
MIN_PIXELS = 10  # objects seen in fewer pixels of all cameras are not evaluated
SCENES = {"train": range(40), "val": range(40, 50)}

_SIZES = np.array([[4.5, 1.9, 1.6], [7.0, 2.5, 3.0], [0.7, 0.7, 1.75]])
_SUN = np.array([0.4, 0.3, 0.866]) / np.linalg.norm([0.4, 0.3, 0.866])


@dataclass(frozen=True)
class Scene:
    """Objects of one scene in the LiDAR frame of its first frame.

    Attributes:
        boxes: (N, 7). labels: (N,) indices into `CLASSES`. velocity: (N, 2) in m/s. albedo: (N, 3) in [0, 1].
    """

    boxes: Array
    labels: NDArray[np.int64]
    velocity: Array
    albedo: Array


def make_scene(index: int) -> Scene:
    """Objects of scene ``index``, drawn from ``RandomState(10000 + index)`` (numpy's frozen stream)."""
    draw = RandomState(10000 + index)
    boxes: list[Array] = []
    labels: list[int] = []
    velocity: list[Array] = []
    albedo: list[Array] = []
    for _ in range(draw.randint(6, 15)):
        label = int(draw.choice(3, p=[0.6, 0.15, 0.25]))
        size = _SIZES[label] * (1 + 0.1 * (2 * draw.random_sample(3) - 1))
        for _ in range(30):
            radius, angle = 4 + 24 * draw.random_sample(), 2 * math.pi * draw.random_sample()
            yaw = 2 * math.pi * draw.random_sample() - math.pi
            center = (radius * math.cos(angle), radius * math.sin(angle), GROUND + size[2] / 2)
            box = np.array([*center, *size, yaw])
            if radius - max(size[0], size[1]) / 2 >= 1.5 and not any(_touch(box, other) for other in boxes):
                break
        else:
            continue
        speed = (1.5 if CLASSES[label] == "pedestrian" else 5.0) * draw.random_sample()
        speed *= float(draw.random_sample() < 0.4)
        boxes.append(box)
        labels.append(label)
        velocity.append(speed * np.array([math.cos(yaw), math.sin(yaw)]))
        albedo.append(0.25 + 0.7 * draw.random_sample(3))
    return Scene(np.stack(boxes), np.array(labels), np.stack(velocity), np.stack(albedo))


def footprint(box: Array) -> Array:
    """The four ground corners (4, 2) of a box (7,), counter-clockwise."""
    x, y, _, length, width, _, yaw = box
    forward = np.array([math.cos(yaw), math.sin(yaw)])
    left = np.array([-forward[1], forward[0]])
    signs = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) / 2
    return np.array([x, y]) + signs[:, :1] * length * forward + signs[:, 1:] * width * left


def _touch(a: Array, b: Array, margin: float = 0.3) -> bool:
    """Whether two footprints come closer than ``margin``: no edge normal separates them by it."""
    corners = footprint(a), footprint(b)
    for polygon in corners:
        for edge in np.roll(polygon, -1, axis=0) - polygon:
            normal = np.array([-edge[1], edge[0]]) / np.linalg.norm(edge)
            p, q = corners[0] @ normal, corners[1] @ normal
            if max(p.min() - q.max(), q.min() - p.max()) > margin:
                return False
    return True


def ego_pose(frame: int) -> tuple[Array, float]:
    """Position (2,) and heading in radians after ``frame`` moves of 0.5 m forward, each followed by 1° to the left."""
    headings = np.radians(np.arange(frame))
    return 0.5 * np.array([-np.sin(headings).sum(), np.cos(headings).sum()]), math.radians(frame)


def boxes_at(scene: Scene, frame: int) -> tuple[Array, Array]:
    """Boxes (N, 7) and velocities (N, 2) of a frame in its own LiDAR frame."""
    position, heading = ego_pose(frame)
    cos, sin = math.cos(heading), math.sin(heading)
    to_ego = np.array([[cos, sin], [-sin, cos]])
    boxes = scene.boxes.copy()
    boxes[:, :2] = (boxes[:, :2] + scene.velocity * (FRAME_SECONDS * frame) - position) @ to_ego.T
    boxes[:, 6] = (boxes[:, 6] - heading + math.pi) % (2 * math.pi) - math.pi
    return boxes, scene.velocity @ to_ego.T


def camera_matrices() -> tuple[Array, Array, Array]:
    """Intrinsics (3, 3) of all cameras, camera-to-LiDAR (6, 4, 4) and LiDAR-to-image (6, 4, 4)."""
    focal = WIDTH / 2 / math.tan(math.radians(FIELD_OF_VIEW / 2))
    intrinsic = np.array([[focal, 0, WIDTH / 2], [0, focal, HEIGHT / 2], [0, 0, 1]])
    cam2lidar = np.tile(np.eye(4), (len(CAMERAS), 1, 1))
    for matrix, yaw in zip(cam2lidar, CAMERA_YAW, strict=True):
        angle = math.radians(90 + yaw)
        forward = np.array([math.cos(angle), math.sin(angle), 0])
        right = np.array([math.sin(angle), -math.cos(angle), 0])
        matrix[:3, :3] = np.stack([right, [0, 0, -1], forward], axis=1)
        matrix[:3, 3] = 0.5 * forward + [0, 0, -0.3]
    image = np.eye(4)
    image[:3, :3] = intrinsic
    return intrinsic, cam2lidar, image @ np.linalg.inv(cam2lidar)


INTRINSIC, CAM2LIDAR, LIDAR2IMG = camera_matrices()


def render(
    scene_index: int, scene: Scene, frame: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint16], NDArray[np.int64]]:
    """Images (6, 96, 160, 3), depth (6, 96, 160) in 1/256 m with 0 for the sky, visible pixels (N,) of each object."""
    boxes, _ = boxes_at(scene, frame)
    images = np.empty((len(CAMERAS), HEIGHT, WIDTH, 3), np.uint8)
    depths = np.empty((len(CAMERAS), HEIGHT, WIDTH), np.uint16)
    pixels = np.zeros(len(boxes), np.int64)
    for camera in range(len(CAMERAS)):
        color, depth, owner = _trace(camera, boxes, scene.albedo, frame)
        noise = RandomState(500000 + 100 * scene_index + 10 * frame + camera).standard_normal(color.shape)
        images[camera] = np.clip(np.floor((color + 0.02 * noise) * 255 + 0.5), 0, 255)
        depths[camera] = np.round(256 * depth)
        pixels += np.bincount(owner[owner >= 0], minlength=len(boxes))
    return images, depths, pixels


def _trace(camera: int, boxes: Array, albedo: Array, frame: int) -> tuple[Array, Array, NDArray[np.int64]]:
    """Color (Y, X, 3), depth (Y, X) and box index (Y, X; −1 is none) that the rays of one camera hit first."""
    origin, rotation = CAM2LIDAR[camera, :3, 3], CAM2LIDAR[camera, :3, :3]
    u, v = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    # Directions have length 1 along the camera's axis, so that the ray parameter is the depth.
    rays = np.stack([(u - WIDTH / 2) / INTRINSIC[0, 0], (v - HEIGHT / 2) / INTRINSIC[1, 1], np.ones_like(u)], -1)
    rays = rays @ rotation.T
    up = np.maximum(0, (HEIGHT / 2 - v) / (HEIGHT / 2))[..., None]
    color = np.array([0.75, 0.8, 0.9]) * (1 - up) + np.array([0.35, 0.5, 0.8]) * up
    nearest = np.full(u.shape, np.inf)

    with np.errstate(divide="ignore", invalid="ignore"):
        t = (GROUND - origin[2]) / rays[..., 2]
    hit = origin + np.where(t > 0, t, 0)[..., None] * rays
    ground = (t > 0) & (np.hypot(hit[..., 0], hit[..., 1]) <= 60)
    position, heading = ego_pose(frame)
    cos, sin = math.cos(heading), math.sin(heading)
    world = hit[ground][:, :2] @ np.array([[cos, sin], [-sin, cos]]) + position
    shade = np.where(np.floor(world / 2).sum(1) % 2 == 0, 0.30, 0.42)
    color[ground] = shade[:, None] * np.array([1, 0.97, 0.9])
    nearest[ground] = t[ground]

    owner = np.full(u.shape, -1)
    for index, box in enumerate(boxes):
        cos, sin = math.cos(box[6]), math.sin(box[6])
        to_box = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
        start = to_box @ (origin - box[:3])
        window = _window(camera, box)
        if window is None:
            continue
        direction = rays[window] @ to_box.T
        with np.errstate(divide="ignore", invalid="ignore"):
            a, b = (-box[3:6] / 2 - start) / direction, (box[3:6] / 2 - start) / direction
        enter, leave = np.minimum(a, b), np.maximum(a, b)
        near, axis = enter.max(-1), enter.argmax(-1)
        seen = (near <= leave.min(-1)) & (near > 0.1) & (near < nearest[window])
        facing = -np.sign(np.take_along_axis(direction, axis[..., None], -1)[..., 0])
        light = np.maximum(0, facing * (to_box @ _SUN)[axis])  # the normal is ± an axis of the box
        color[window][seen] = albedo[index] * (0.35 + 0.65 * light[seen])[:, None]
        nearest[window][seen] = near[seen]
        owner[window][seen] = index
    return color, np.where(np.isinf(nearest), 0, nearest), owner


def box_corners(boxes: Array) -> Array:
    """Corners (N, 8, 3) of boxes (N, 7): four below counter-clockwise, then four above."""
    ground = np.stack([footprint(box) for box in boxes]) if len(boxes) else np.zeros((0, 4, 2))
    z = boxes[:, 2:3, None] + np.array([-0.5, 0.5]) * boxes[:, 5:6, None]
    flat = np.tile(ground, (1, 2, 1))
    return np.concatenate([flat, np.repeat(z[:, 0], 4, axis=1)[..., None]], -1)


def _window(camera: int, box: Array) -> tuple[slice, slice] | None:
    """Rows and columns that can show a box; all of them where it reaches behind the camera."""
    corners = np.concatenate([box_corners(box[None])[0], np.ones((8, 1))], 1) @ LIDAR2IMG[camera].T
    depth = corners[:, 2]
    if (depth <= 0.1).all():
        return None
    if (depth <= 0.1).any():
        return slice(0, HEIGHT), slice(0, WIDTH)
    low = np.floor((corners[:, :2] / depth[:, None]).min(0)).astype(int)
    high = np.ceil((corners[:, :2] / depth[:, None]).max(0)).astype(int)
    x0, y0, x1, y1 = max(0, low[0]), max(0, low[1]), min(WIDTH, high[0]), min(HEIGHT, high[1])
    return (slice(y0, y1), slice(x0, x1)) if x0 < x1 and y0 < y1 else None


def record(scene_index: int, frame: int) -> dict[str, Any]:
    """One sample in the layout of a nuScenes info record, with images and depth as arrays instead of paths.

    Keys: token, scene_token, frame_idx, prev, next, timestamp (µs), cams {name: {img, depth, width, height,
    cam_intrinsic, cam2lidar, lidar2img}}, gt_boxes (N, 7), gt_velocity (N, 2), gt_names, num_pixels (N,), can_bus
    (18,; zero but for the translation of the car [0:2], its yaw in radians [-2] and degrees [-1]).
    """
    scene = make_scene(scene_index)
    images, depths, pixels = render(scene_index, scene, frame)
    boxes, velocity = boxes_at(scene, frame)
    position, heading = ego_pose(frame)
    can_bus = np.zeros(18)
    can_bus[:2], can_bus[-2], can_bus[-1] = position, heading, frame
    cameras = {
        name: {
            "img": images[i],
            "depth": depths[i],
            "width": WIDTH,
            "height": HEIGHT,
            "cam_intrinsic": INTRINSIC,
            "cam2lidar": CAM2LIDAR[i],
            "lidar2img": LIDAR2IMG[i],
        }
        for i, name in enumerate(CAMERAS)
    }
    return {
        "token": _token(scene_index, frame),
        "scene_token": f"ring3d-{scene_index:02d}",
        "frame_idx": frame,
        "prev": _token(scene_index, frame - 1) if frame else "",
        "next": _token(scene_index, frame + 1) if frame + 1 < FRAMES else "",
        "timestamp": int((scene_index * 100 + frame * FRAME_SECONDS) * 1e6),
        "cams": cameras,
        "gt_boxes": boxes,
        "gt_velocity": velocity,
        "gt_names": [CLASSES[label] for label in scene.labels],
        "num_pixels": pixels,
        "can_bus": can_bus,
    }


def _token(scene: int, frame: int) -> str:
    return f"ring3d-{scene:02d}-{frame}"


def sparse(depth: NDArray[np.uint16], scene: int, frame: int, camera: int, keep: float = 0.05) -> NDArray[np.uint16]:
    """Depth of a LiDAR: each pixel survives with probability ``keep``, the same pixels every time."""
    chance = RandomState(700000 + 100 * scene + 10 * frame + camera).random_sample(depth.shape)
    return np.where(chance < keep, depth, 0).astype(np.uint16)


class Ring3D(Dataset[dict[str, Any]]):
    """Samples of a split, rendered when first asked for and kept.

    Args:
        split: ``"train"`` (40 scenes) or ``"val"`` (10 scenes).
        scenes: the first so many scenes of the split; None means all.
        depth: ``"dense"`` or ``"sparse"``, 5 % of the pixels as a LiDAR has them.
        mirror: mirror samples left–right with probability ½ in training: images, cameras and boxes.

    Items: image (6, 3, 96, 160) float32 in [0, 1] · depth (6, 96, 160) float32 in m, 0 unknown · lidar2img (6, 4, 4)
    float32 · boxes (N, 9) float32: x, y, z, l, w, h, yaw, vx, vy of objects visible in ≥ 10 pixels · labels (N,) ·
    index. N differs: use `collate_scenes`.
    Raises: ValueError for an unknown split or depth, or a number of scenes that the split does not have.
    """

    def __init__(
        self,
        split: Literal["train", "val"] = "train",
        *,
        scenes: int | None = None,
        depth: Literal["dense", "sparse"] = "dense",
        mirror: bool = False,
    ) -> None:
        if split not in SCENES:
            raise ValueError(f"Ring3D: split must be 'train' or 'val', got split={split!r}")
        if depth not in ("dense", "sparse"):
            raise ValueError(f"Ring3D: depth must be 'dense' or 'sparse', got depth={depth!r}")
        numbers = SCENES[split]
        if scenes is not None and not 1 <= scenes <= len(numbers):
            raise ValueError(f"Ring3D: scenes must be 1…{len(numbers)} in split {split!r}, got scenes={scenes}")
        self.depth = depth
        self.mirror = mirror
        self.samples = [(scene, frame) for scene in numbers[:scenes] for frame in range(FRAMES)]
        self.metainfo: dict[str, Any] = {"classes": list(CLASSES), "cameras": list(CAMERAS)}
        self._rendered: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index not in self._rendered:
            self._rendered[index] = self._load(*self.samples[index])
        kept = self._rendered[index]
        item = {
            "image": kept["image"].float() / 255,
            "depth": kept["depth"],
            "lidar2img": torch.from_numpy(LIDAR2IMG).float(),
            "boxes": kept["boxes"],
            "labels": kept["labels"],
            "index": index,
        }
        return _mirrored(item) if self.mirror and torch.rand(()) < 0.5 else item

    def _load(self, scene: int, frame: int) -> dict[str, Any]:
        sample = record(scene, frame)
        cameras = [sample["cams"][name] for name in CAMERAS]
        depths = [camera["depth"] for camera in cameras]
        if self.depth == "sparse":
            depths = [sparse(depth, scene, frame, i) for i, depth in enumerate(depths)]
        visible = sample["num_pixels"] >= MIN_PIXELS
        boxes = np.concatenate([sample["gt_boxes"], sample["gt_velocity"]], 1)[visible]
        labels = np.array([CLASSES.index(name) for name in sample["gt_names"]])[visible]
        return {
            "image": torch.from_numpy(np.stack([camera["img"] for camera in cameras])).permute(0, 3, 1, 2).contiguous(),
            "depth": torch.from_numpy(np.stack(depths).astype(np.float32) / 256),
            "boxes": torch.from_numpy(boxes).float(),
            "labels": torch.from_numpy(labels),
        }


_MIRROR_PARTNER = [0, 5, 4, 3, 2, 1]  # the camera that sees a camera's mirrored view


def _mirrored(item: dict[str, Any]) -> dict[str, Any]:
    """The scene mirrored at the plane x = 0; the cameras stay where they are, as the ring is symmetric."""
    boxes = item["boxes"].clone()
    boxes[:, 0] = -boxes[:, 0]
    boxes[:, 6] = math.pi - boxes[:, 6]
    boxes[:, 7] = -boxes[:, 7]
    image, depth = item["image"][_MIRROR_PARTNER].flip(-1), item["depth"][_MIRROR_PARTNER].flip(-1)
    return {**item, "image": image, "depth": depth, "boxes": boxes}


def collate_scenes(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack images, depth, cameras and indices; boxes and labels stay lists of tensors, one per sample."""
    batch: dict[str, Any] = {key: torch.stack([item[key] for item in items]) for key in ("image", "depth", "lidar2img")}
    batch["index"] = torch.tensor([item["index"] for item in items])
    return batch | {key: [item[key] for item in items] for key in ("boxes", "labels")}
