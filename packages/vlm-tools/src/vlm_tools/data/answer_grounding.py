"""Questions with the part of a picture that answers them: VizWiz-VQA-Grounding, VQA-X, TextVQA-X, VQS.

Three forms of annotation are read: VizWiz's (a dict by picture with ``answer_grounding``, a polygon, and masks as PNG
files beside it), pictures of masks that a list of records names (for VQA-X and TextVQA-X), and annotations of COCO that
a list of records links to questions (for VQS). No released file was at hand: names that differ are a line to change.
Polygons are filled with their outline. Scores are intersection over union at the mask's own size.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from attn_core import pictures
from vlm_tools.data.hashed_words import hashed_words

Said = Literal["question", "question and answer"]


@dataclass(frozen=True)
class Grounded:
    """A question about a picture and what answers it.

    Attributes:
        picture: its file.
        question, answer: texts; the answer may be empty.
        mask_file: picture whose pixels above half of its range are the answer's; None if it is drawn.
        polygons: each a list of (x, y) in pixels.
        runs: lengths of runs of 0 and 1 in turn, down the columns (COCO's).
        size: (height, width) of a drawn mask; None: the picture's.
    """

    picture: Path
    question: str
    answer: str = ""
    mask_file: Path | None = None
    polygons: tuple[tuple[tuple[float, float], ...], ...] = ()
    runs: tuple[tuple[int, ...], ...] = ()
    size: tuple[int, int] | None = None

    @cached_property
    def mask(self) -> Bool[NDArray[Any], "Y X"]:
        """True where the answer is.

        Raises:
            ValueError: a mask that cannot be read, runs that do not fill the picture.
        """
        if self.mask_file is not None:
            levels = np.asarray(Image.fromarray(pictures.read_picture(self.mask_file).rgb()).convert("L"))
            return levels >= 128
        height, width = self.size or self._picture_size()
        drawn = Image.new("L", (width, height))
        for polygon in self.polygons:
            ImageDraw.Draw(drawn).polygon(list(polygon), fill=1, outline=1)
        mask = np.asarray(drawn) > 0
        for runs in self.runs:
            if sum(runs) != height * width:
                raise ValueError(f"{self.picture}: runs of {sum(runs)} pixels do not fill {height}×{width}")
            filled = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
            mask = mask | filled.reshape(width, height).T
        return mask

    def _picture_size(self) -> tuple[int, int]:
        shown = pictures.read_picture(self.picture).rgb()
        return shown.shape[0], shown.shape[1]


def read_vizwiz(annotations: Path, images: Path, masks: Path | None = None) -> list[Grounded]:
    """VizWiz-VQA-Grounding.

    Args:
        annotations: json, picture's name → ``question``, ``answers`` or ``most_common_answer``, ``answer_grounding``
            ([{"x", "y"}, …]), ``height``, ``width``.
        images: folder of the pictures.
        masks: folder of ``<picture>.png``; None: the polygons are drawn.

    Raises:
        ValueError: another form; the message names file and record.
    """
    table = _json(annotations)
    if not isinstance(table, dict):
        raise ValueError(f"{annotations}: expected a dict by picture, got a {type(table).__name__}")
    found = []
    for name, record in table.items():
        where = f"{annotations}: {name}"
        question = _text(record, ("question",), where)
        answer = _text(record, ("most_common_answer",), where, needed=False) or _common(record)
        if masks is not None:
            found.append(Grounded(images / name, question, answer, mask_file=masks / f"{Path(name).stem}.png"))
            continue
        polygon = _polygon(record, where)
        polygons = (polygon,) if len(polygon) > 2 else ()
        height, width = (record.get(side) for side in ("height", "width"))
        told = isinstance(height, int) and isinstance(width, int) and min(height, width) > 0
        size = (height, width) if told else None
        found.append(Grounded(images / name, question, answer, polygons=polygons, size=size))
    return found


def read_masks(annotations: Path, images: Path, masks: Path) -> list[Grounded]:
    """Records that name a picture and a picture of its mask, as VQA-X and TextVQA-X are stored.

    Args:
        annotations: json, list of ``{"question", "image", "mask", "answer"}``, or a dict of them by number; without
            ``mask`` it is ``<number or question_id>.png``.

    Raises:
        ValueError: another form, a mask that does not exist.
    """
    found = []
    for number, record in _records(annotations):
        where = f"{annotations}: record {number}"
        image = _text(record, ("image", "image_name", "image_id"), where)
        own = record.get("mask", f"{record.get('question_id', number)}.png")
        file = masks / str(own)
        if not file.is_file():
            raise ValueError(f"{where}: there is no mask {file}")
        question, answer = _text(record, ("question",), where), _text(record, ("answer",), where, needed=False)
        found.append(Grounded(images / image, question, answer, mask_file=file))
    return found


def read_vqs(links: Path, instances: Path, images: Path) -> list[Grounded]:
    """Questions linked to COCO's annotations.

    Args:
        links: json, list of ``{"question", "annotation_ids" (or "ann_ids"), "answer"}``.
        instances: COCO's ``instances_*.json``: ``images`` and ``annotations`` with polygons or runs, packed ones too.

    Raises:
        ValueError: another form, an annotation that does not exist or belongs to another picture.
    """
    coco = _json(instances)
    if not isinstance(coco, dict) or not all(isinstance(coco.get(part), list) for part in ("images", "annotations")):
        raise ValueError(f"{instances}: expected COCO's images and annotations")
    shown = {image["id"]: image for image in coco["images"]}
    known = {annotation["id"]: annotation for annotation in coco["annotations"]}
    found = []
    for number, record in _records(links):
        where = f"{links}: record {number}"
        ids = record.get("annotation_ids", record.get("ann_ids"))
        if not isinstance(ids, list) or not ids or any(one not in known for one in ids):
            raise ValueError(f"{where}: annotation_ids must be known to {instances.name}, got {ids!r}")
        chosen = [known[one] for one in ids]
        place = {annotation["image_id"] for annotation in chosen}
        if len(place) != 1 or not place <= shown.keys():
            raise ValueError(f"{where}: annotations {ids} belong to the pictures {sorted(place)}, not to one")
        image = shown[place.pop()]
        polygons, runs = [], []
        for annotation in chosen:
            segmentation = annotation["segmentation"]
            if isinstance(segmentation, dict):
                counts = segmentation["counts"]
                runs.append(tuple(unpacked_runs(counts) if isinstance(counts, str) else counts))
            else:
                polygons += [tuple(zip(flat[::2], flat[1::2], strict=True)) for flat in segmentation]
        found.append(
            Grounded(
                images / image["file_name"],
                _text(record, ("question",), where),
                _text(record, ("answer",), where, needed=False),
                polygons=tuple(polygons),
                runs=tuple(runs),
                size=(image["height"], image["width"]),
            )
        )
    return found


def unpacked_runs(text: str) -> list[int]:
    """Lengths of runs out of COCO's packed text: groups of 5 bits, lowest first; from the fourth run on
    the difference from the run two before.

    Raises:
        ValueError: a text that ends within a number or holds other characters.
    """
    runs: list[int] = []
    value, shift = 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"unpacked_runs: {character!r} is no group of 5 bits")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:  # the sign
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    if shift:
        raise ValueError("unpacked_runs: the text ends within a number")
    return runs


class AnswerGroundings(Dataset[dict[str, Any]]):
    """Records for training and testing `SentenceBlocks`.

    Args:
        records: of the readers above.
        side: pictures and masks are brought to side×side pixels.
        encode: texts → (B, E); hashed words of 384 by default.
        text: what is encoded.

    Raises:
        ValueError: no record, a side below 1.

    Shapes: image (3, side, side) float32 in [0, 1]; text (E,); mask (1, side, side) float32, 0 or 1.
    """

    def __init__(
        self,
        records: Sequence[Grounded],
        side: int = 448,
        *,
        encode: Callable[[Sequence[str]], Tensor] = hashed_words,
        text: Said = "question and answer",
    ) -> None:
        if not records or side < 1:
            raise ValueError(f"AnswerGroundings: needs records and a side, got {len(records)} records, side={side}")
        if text not in ("question", "question and answer"):
            raise ValueError(f"AnswerGroundings: text must be 'question' or 'question and answer', got text={text!r}")
        self.records = list(records)
        self.side = side
        self.encode = encode
        self.text = text

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        mask = Image.fromarray(record.mask).resize((self.side, self.side), Image.Resampling.NEAREST)
        return {
            "image": picture_tensor(record.picture, self.side),
            "text": self.encode([self.said(record)])[0],
            "mask": torch.from_numpy(np.array(mask)).float()[None],
        }

    def said(self, record: Grounded) -> str:
        """The text that is encoded."""
        return record.question if self.text == "question" else f"{record.question} {record.answer}".strip()


def picture_tensor(file: Path, side: int) -> Float[Tensor, "3 Y X"]:
    """A picture brought to side×side pixels, in [0, 1]."""
    shown = Image.fromarray(pictures.read_picture(file).rgb()).resize((side, side), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(shown)).permute(2, 0, 1).float() / 255


def mean_iou(found: Iterable[Bool[NDArray[Any], "Y X"]], records: Sequence[Grounded]) -> float:
    """Mean intersection over union of predicted masks, each brought to its truth's size; both empty count 1.

    Raises:
        ValueError: not as many masks as records, none, a mask that is not bool.
    """
    scores = []
    for number, (mask, record) in enumerate(zip(found, records, strict=True)):
        if mask.dtype != np.bool_ or mask.ndim != 2:
            raise ValueError(f"mean_iou: mask {number} must be bool (Y, X), got {mask.dtype} {mask.shape}")
        truth = record.mask
        if mask.shape != truth.shape:
            size = (truth.shape[1], truth.shape[0])
            mask = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        either = int((mask | truth).sum())
        scores.append(int((mask & truth).sum()) / either if either else 1.0)
    if not scores:
        raise ValueError("mean_iou: there is no mask")
    return sum(scores) / len(scores)


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: no JSON ({str(error)[:80]})") from None


def _records(file: Path) -> Iterable[tuple[Any, Mapping[str, Any]]]:
    table = _json(file)
    if not isinstance(table, list | dict) or not table:
        raise ValueError(f"{file}: expected a list of records")
    rows = table.items() if isinstance(table, dict) else enumerate(table)
    for number, record in rows:
        if not isinstance(record, dict):
            raise ValueError(f"{file}: record {number} is a {type(record).__name__}, not a dict")
        yield number, record


def _text(record: Any, names: Sequence[str], where: str, *, needed: bool = True) -> str:
    value = next((record[name] for name in names if isinstance(record, dict) and record.get(name) is not None), None)
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    if needed or value is not None:
        raise ValueError(f"{where}: {names[0]} must be a text, got {value!r}")
    return ""


def _polygon(record: Mapping[str, Any], where: str) -> tuple[tuple[float, float], ...]:
    points = record.get("answer_grounding")
    named = isinstance(points, list) and all(isinstance(p, dict) and _numbers(p.get("x"), p.get("y")) for p in points)
    if not isinstance(points, list) or not named:
        raise ValueError(f"{where}: answer_grounding must be a list of {{x, y}}")
    return tuple((float(p["x"]), float(p["y"])) for p in points)


def _common(record: Mapping[str, Any]) -> str:
    """The answer given most often, the first of equals."""
    given = record.get("answers")
    given = given if isinstance(given, list) else []
    said = [one.get("answer") if isinstance(one, dict) else one for one in given]
    said = [one for one in said if isinstance(one, str)]
    return max(said, key=said.count) if said else ""


def _numbers(*values: Any) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6 for value in values)
