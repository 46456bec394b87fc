"""VL-SAM: attention flow of an object's word to the image, as point prompts for a segmenter.

Paper: Lin et al., Training-Free Open-Ended Object Detection and Segmentation via Attention as Prompts, NeurIPS 2024,
arXiv 2410.05963. No code is released; this follows the paper's equations.

Heads are weighted by their mean row maximum, layers chained by R_l = (I + S_l)(I + R_{l−1}) with the factor 1 − (N −
j − 1)/N on column j against the pile-up of early tokens. Only one row of R is needed, so the chain runs from the last
layer down with vector-matrix products; a layer's probabilities are recomputed in blocks of rows and no N×N map is
held. `dense_flow` is the same equation in full, for tests. `refined_masks` is the iteration with the segmenter; the
quarters of the picture and the ten questions, which the paper runs besides, are calls of yours. Checked in
``tests/readings/test_vl_sam.py``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256


@dataclass(frozen=True)
class LayerRecord:
    """Queries (H, N, D) and keys (Hk, N, D) of one layer of one prompt, and the factor of their products."""

    q: Float[Tensor, "H N D"]
    k: Float[Tensor, "Hk N D"]
    scale: float
    seen: Bool[Tensor, "N N"] | None = None

    def blocks(self) -> Iterable[tuple[int, Float[Tensor, "H b N"]]]:
        """Probabilities, a block of rows at a time: (first row, block)."""
        heads, length, _ = self.q.shape
        k = self.k.repeat_interleave(heads // self.k.shape[0], 0)
        column = torch.arange(length, device=self.q.device)
        for start in range(0, length, BLOCK):
            rows = slice(start, min(start + BLOCK, length))
            score = (self.q[:, rows] @ k.transpose(-2, -1)).float() * self.scale
            seen = column[None] <= column[rows, None] if self.seen is None else self.seen[rows]
            yield start, score.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)

    def row(self, index: int) -> Float[Tensor, "H N"]:
        """Probabilities of one query."""
        heads = self.q.shape[0]
        k = self.k.repeat_interleave(heads // self.k.shape[0], 0)
        score = torch.einsum("hd,hnd->hn", self.q[:, index], k).float() * self.scale
        column = torch.arange(score.shape[1], device=score.device)
        seen = column <= index if self.seen is None else self.seen[index]
        return score.masked_fill(~seen, -torch.inf).softmax(-1)


def head_weights(record: LayerRecord) -> Float[Tensor, " H"]:
    """Mean over queries of the largest probability in each row."""
    peaks = [block.amax(-1).sum(-1) for _, block in record.blocks()]
    return torch.stack(peaks).sum(0) / record.q.shape[1]


def flow_row(
    records: Sequence[LayerRecord], row: int, *, weighted: bool = True, regularized: bool = True
) -> Float[Tensor, " N"]:
    """Row ``row`` of the attention flow through all layers.

    With T_l = S_l·diag(c) and R_0 = T_0, R_l = (I + T_l)(I + R_{l−1}) − I.

    Args:
        records: layers from first to last.
        row: token that asks.
        weighted: weight heads by `head_weights`; else their mean.
        regularized: the column factor c; else 1.

    Raises:
        ValueError: no layer, or a row that does not exist.
    """
    if not records:
        raise ValueError("flow_row: there is no layer")
    length = records[0].q.shape[1]
    if not -length <= row < length:
        raise ValueError(f"flow_row: the prompt has tokens 0 … {length - 1}, got row={row}")
    factor = _column_factor(length, records[0].q.device) if regularized else 1.0
    vector = torch.zeros(length, device=records[0].q.device)
    vector[row] = 1.0
    for record in reversed(records):
        heads = record.q.shape[0]
        weight = head_weights(record) / heads if weighted else torch.full((heads,), 1 / heads, device=vector.device)
        added = torch.zeros_like(vector)
        for start, block in record.blocks():
            part = vector[start : start + block.shape[1]]
            added += torch.einsum("b,h,hbn->n", part, weight.to(part.dtype), block)
        vector = vector + added * factor
    vector[row] -= 1.0
    return vector


def dense_flow(maps: Sequence[Float[Tensor, "N N"]], *, regularized: bool = True) -> Float[Tensor, "N N"]:
    """The whole flow of head-averaged maps: what `flow_row` gives a row of."""
    length = maps[0].shape[0]
    eye = torch.eye(length, dtype=maps[0].dtype)
    factor = _column_factor(length, maps[0].device).to(maps[0].dtype) if regularized else 1.0
    total = eye
    for one in maps:
        total = (eye + one * factor) @ total
    return total - eye


def _column_factor(length: int, device: torch.device) -> Float[Tensor, " N"]:
    seen_by = length - torch.arange(length, device=device)
    return 1 - (seen_by - 1) / length


@dataclass(frozen=True)
class PointPrompt:
    """A positive and a negative point in cells (x, y), and the region of the positive one."""

    positive: tuple[int, int]
    negative: tuple[int, int]
    region: np.ndarray[Any, Any]


def point_prompt(heat: Float[Tensor, "y x"], *, threshold: float = 0.5) -> PointPrompt:
    """Largest connected region above a threshold; its maximum is positive, the minimum outside negative.

    Args:
        threshold: of the map scaled to [0, 1].

    Raises:
        ValueError: a constant map.
    """
    values = heat.detach().float().cpu().numpy()
    low, high = values.min(), values.max()
    if not high > low:
        raise ValueError("point_prompt: the map is constant, no point stands out")
    values = (values - low) / (high - low)
    region = largest_component(values >= threshold)
    top = np.where(region, values, -1)
    bottom = np.where(region, 2, values)
    y, x = np.unravel_index(int(top.argmax()), top.shape)
    v, u = np.unravel_index(int(bottom.argmin()), bottom.shape)
    return PointPrompt((int(x), int(y)), (int(u), int(v)), region)


def largest_component(mask: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The largest region of 4-connected cells; of equals the one that comes first in raster order."""
    label = np.zeros(mask.shape, dtype=int)
    best, best_size, number = 0, 0, 0
    for start in zip(*np.nonzero(mask), strict=True):
        if label[start]:
            continue
        number += 1
        waiting, size = [start], 0
        label[start] = number
        while waiting:
            y, x = waiting.pop()
            size += 1
            for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= v < mask.shape[0] and 0 <= u < mask.shape[1] and mask[v, u] and not label[v, u]:
                    label[v, u] = number
                    waiting.append((v, u))
        if size > best_size:
            best, best_size = number, size
    return label == best if best else np.zeros_like(mask)


class Segmenter(Protocol):
    """What turns points, and perhaps an earlier mask, into a mask."""

    def predict(
        self,
        image: np.ndarray[Any, Any],
        points: Int[Tensor, "K 2"],
        labels: Int[Tensor, " K"],
        mask: np.ndarray[Any, Any] | None = None,
    ) -> tuple[np.ndarray[Any, Any], float]:
        """(Y, X) bool mask and its score, from points (x, y) in pixels, labels 1 or 0, and a (Y, X) bool mask."""
        ...


def refined_masks(
    image: np.ndarray[Any, Any],
    heat: Float[Tensor, "Y X"],
    segmenter: Segmenter,
    *,
    threshold: float = 0.5,
    overlap: float = 0.7,
) -> list[tuple[np.ndarray[Any, Any], float]]:
    """The paper's iteration: points; the same points with the mask they gave; points of the map inside that mask.

    Args:
        image: (Y, X, 3) or (Y, X) picture.
        heat: relevance of its pixels.
        threshold: as of `point_prompt`.
        overlap: of two masks with a larger intersection over union only the one with the better score stays.

    Returns:
        Masks that are not empty with their scores, best first.

    Raises:
        ValueError: sizes differ, a constant map, an overlap outside [0, 1].
    """
    if tuple(heat.shape) != image.shape[:2]:
        raise ValueError(f"refined_masks: heat is {tuple(heat.shape)}, the picture {image.shape[:2]}")
    if not 0 <= overlap <= 1:
        raise ValueError(f"refined_masks: overlap must lie in [0, 1], got overlap={overlap}")
    points, labels = _pair(point_prompt(heat, threshold=threshold))
    found = [segmenter.predict(image, points, labels)]
    found.append(segmenter.predict(image, points, labels, found[0][0]))
    inside = torch.where(torch.from_numpy(found[1][0]), heat.detach().float().cpu(), float(heat.min()))
    if bool(inside.max() > inside.min()):
        found.append(segmenter.predict(image, *_pair(point_prompt(inside, threshold=threshold)), found[1][0]))
    kept: list[tuple[np.ndarray[Any, Any], float]] = []
    for mask, score in sorted(found, key=lambda one: -one[1]):
        if mask.any() and all((mask & other).sum() <= overlap * (mask | other).sum() for other, _ in kept):
            kept.append((mask, score))
    return kept


def _pair(prompt: PointPrompt) -> tuple[Int[Tensor, "2 2"], Int[Tensor, "2"]]:
    return torch.tensor([prompt.positive, prompt.negative]), torch.tensor([1, 0])


class HfSam:
    """SAM or SAM 2 of transformers as a `Segmenter`.

    Args:
        model: ``SamModel`` or ``Sam2Model``.
        processor: its processor.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        self.processor = processor

    def predict(
        self,
        image: np.ndarray[Any, Any],
        points: Int[Tensor, "K 2"],
        labels: Int[Tensor, " K"],
        mask: np.ndarray[Any, Any] | None = None,
    ) -> tuple[np.ndarray[Any, Any], float]:
        """The mask with the best predicted overlap."""
        inputs = self.processor(
            images=image, input_points=[[points.tolist()]], input_labels=[[labels.tolist()]], return_tensors="pt"
        )
        own = {name: inputs[name] for name in ("pixel_values", "input_points", "input_labels")}
        if mask is not None:
            own["input_masks"] = self._low_resolution(mask, inputs.get("reshaped_input_sizes"))
        with torch.no_grad():
            out = self.model(**{name: value.to(self.model.device) for name, value in own.items()})
        sizes = [inputs["original_sizes"]]
        if "reshaped_input_sizes" in inputs:
            sizes.append(inputs["reshaped_input_sizes"])
        masks = self.processor.post_process_masks(out.pred_masks.cpu(), *sizes)[0]
        best = int(out.iou_scores.flatten().argmax())
        return masks.flatten(0, -3)[best].numpy() > 0, float(out.iou_scores.flatten()[best])

    def _low_resolution(self, mask: np.ndarray[Any, Any], reshaped: Tensor | None) -> Float[Tensor, "1 1 y x"]:
        """The mask as logits ±10 on SAM's grid: padded to the lower right in SAM, squashed in SAM 2."""
        config = self.model.config.prompt_encoder_config
        side = 4 * config.image_size // config.patch_size
        height, width = (side, side) if reshaped is None else (
            max(1, round(int(length) * side / config.image_size)) for length in reshaped[0]
        )  # fmt: skip
        values = torch.from_numpy(mask)[None, None].float() * 20 - 10
        small = F.interpolate(values, (height, width), mode="bilinear", align_corners=False)
        return F.pad(small, (0, side - width, 0, side - height), value=-10.0)


class RegionGrowing:
    """Download-free `Segmenter`: pixels connected to the positive points whose gray value is near theirs.

    Args:
        tolerance: largest difference of gray values in [0, 1].
    """

    def __init__(self, tolerance: float = 0.25) -> None:
        self.tolerance = tolerance

    def predict(
        self,
        image: np.ndarray[Any, Any],
        points: Int[Tensor, "K 2"],
        labels: Int[Tensor, " K"],
        mask: np.ndarray[Any, Any] | None = None,
    ) -> tuple[np.ndarray[Any, Any], float]:
        """The region, grown beyond an earlier mask if there is one; its score is the share of the picture outside."""
        gray = image.astype(float) / (255 if image.dtype == np.uint8 else 1)
        gray = gray.mean(-1) if gray.ndim == 3 else gray
        region = np.zeros(gray.shape, dtype=bool) if mask is None else mask.copy()
        for (x, y), label in zip(points.tolist(), labels.tolist(), strict=True):
            if label == 1:
                near = np.abs(gray - gray[int(y), int(x)]) <= self.tolerance
                region |= _connected(near, int(y), int(x))
        return region, float(1 - region.mean())


def _connected(mask: np.ndarray[Any, Any], y: int, x: int) -> np.ndarray[Any, Any]:
    """Cells of ``mask`` that are connected to a cell."""
    reached = np.zeros_like(mask)
    reached[y, x] = True
    while True:
        grown = reached.copy()
        grown[1:] |= reached[:-1]
        grown[:-1] |= reached[1:]
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown &= mask
        grown[y, x] = True
        if (grown == reached).all():
            return reached
        reached = grown
