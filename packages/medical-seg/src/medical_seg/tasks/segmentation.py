"""What the engine trains: a network with its criterion, whole volumes in validation."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from attn_core.engine import TaskModel, build
from medical_seg.inference.sliding_window import labels_from_planes, logits_by_planes
from medical_seg.losses.dice_ce import DiceCE
from medical_seg.models import create_model, is_planar
from medical_seg.models.multi_scale_attention import GuidedOutput, guided_loss


class SegmentationTask(TaskModel):
    """Training of any network of `create_model` on windows, prediction of whole volumes.

    A window of one plane (1, Y, X) reaches the network as a picture (B, C, Y, X).

    Args:
        network: a name that `create_model` takes.
        window: Z, Y, X of the network's input.
        in_channels, out_channels: of the network.
        options: its further constructor arguments.
        criterion: (logits (B, K, *grid), target (B, *grid)) → scalar, or its recipe. MONAI's losses fit, with
            ``to_onehot_y=True, softmax=True``; `DiceCE` if not given.
        regions: labels of each class where classes overlap, as in `Folder`. Every region is then a problem of two
            classes to the criterion, and the loss is their mean.
        order: the label that each region is written as.
        ignore: a label whose voxels do not reach the criterion.
        channels_last: keep channels fastest in memory; on CPUs a training step of AGUNet takes 0.7 to 0.8 of the time.
        weights: a file that ``convert-weights`` wrote, to start from.

    Raises: ValueError if the weights do not fit the network.
    """

    def __init__(
        self,
        network: str,
        window: Sequence[int],
        *,
        in_channels: int = 1,
        out_channels: int = 2,
        options: dict[str, Any] | None = None,
        criterion: nn.Module | dict[str, Any] | None = None,
        regions: Sequence[Sequence[int]] | None = None,
        order: Sequence[int] = (),
        ignore: int | None = None,
        channels_last: bool = True,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.window = tuple(window)
        self.planar = self.window[0] == 1
        self.out_channels = out_channels
        if regions is not None and not len(regions) == len(order) == out_channels:
            raise ValueError(
                f"SegmentationTask: {len(regions)} regions, {len(order)} labels to write them as and "
                f"out_channels={out_channels} must be equal"
            )
        self.regions = None if regions is None else [list(region) for region in regions]
        self.order = list(order)
        self.ignore = ignore
        given: dict[str, Any] = {"in_channels": in_channels, "out_channels": out_channels, **(options or {})}
        if not is_planar(network):
            given["spatial_dims"] = 2 if self.planar else 3
        self.net = create_model(network, **given)
        if channels_last:
            self.net.to(memory_format=torch.channels_last if self.planar else torch.channels_last_3d)
        built = build(criterion) if criterion else DiceCE()
        self.criterion: Any = built
        self.with_channel = type(built).__module__.startswith("monai.")  # MONAI wants targets (B, 1, *grid)
        if weights is not None:
            _start_from(self.net, Path(weights))

    def tensor(self, image: Float[Tensor, "B C Z Y X"], **_: Any) -> Float[Tensor, "B K Z Y X"]:
        """Logits of windows."""
        return self.net(image[:, :, 0])[:, :, None] if self.planar else self.net(image)

    def loss(self, image: Float[Tensor, "B C Z Y X"], label: Int[Tensor, "B Z Y X"], **_: Any) -> dict[str, Tensor]:
        """The criterion; with deep supervision its mean over the scales, coarser ones counting half of the finer."""
        if self.planar:
            image, label = image[:, :, 0], label[:, 0]
        output = self.net(image)
        if isinstance(output, GuidedOutput):
            return guided_loss(output, label, segmentation=self._criterion)
        if isinstance(output, Tensor):
            return {"loss": self._criterion(output, label)}
        weights = [2.0**-k for k in range(len(output))]
        losses = [
            w * self._criterion(logits, _coarser(label, logits)) for w, logits in zip(weights, output, strict=True)
        ]
        return {"loss": torch.stack(losses).sum() / sum(weights)}

    def predict(
        self, image: Float[Tensor, "B C Z Y X"], label: Int[Tensor, "B Z Y X"], **_: Any
    ) -> list[dict[str, Any]]:
        """Per volume: voxels of each foreground class that are hit, predicted, true; the labels found."""
        results = []
        parts = self.regions or [[k] for k in range(1, self.out_channels)]
        for one, target in zip(image, label.cpu(), strict=True):
            labels = self.segment(one)
            counted = torch.ones_like(target, dtype=torch.bool) if self.ignore is None else target != self.ignore
            pairs = [(_among(labels, part) & counted, _among(target, part)) for part in parts]
            results.append(
                {
                    "hits": [int((found & true).sum()) for found, true in pairs],
                    "predicted": [int(found.sum()) for found, _ in pairs],
                    "true": [int(true.sum()) for _, true in pairs],
                    "labels": labels,
                }
            )
        return results

    def segment(self, image: Float[Tensor, "C Z Y X"]) -> Int[Tensor, "Z Y X"]:
        """Labels of a volume on its own grid."""
        grid = tuple(image.shape[1:])
        planes = logits_by_planes(
            self.tensor,
            partial(_window, image, self.window),
            grid,
            self.window,
            self.out_channels,
            device=next(self.parameters()).device,
        )
        written = labels_from_planes(planes, grid[0], grid, self.order)
        return torch.stack([labels for _, labels in written]).long()

    def written_as(self, classes: Sequence[str]) -> list[tuple[str, list[int]]]:
        """Classes of the foreground and the labels that belong to each, from the names of a data set."""
        if self.regions is None:
            return [(name, [k]) for k, name in enumerate(classes) if k]
        return list(zip(classes, self.regions, strict=True))

    def label_names(self, classes: Sequence[str]) -> list[str]:
        """Names of the labels 0, 1, 2 … of a mask that is written."""
        if self.regions is None:
            return list(classes)
        names = {label: name for name, label in zip(classes, self.order, strict=True)}
        return ["background", *(names.get(k, f"label {k}") for k in range(1, max(self.order) + 1))]

    def _criterion(self, logits: Float[Tensor, "B K *grid"], target: Int[Tensor, "B *grid"]) -> Float[Tensor, ""]:
        if self.ignore is not None:
            counted = target != self.ignore
            if not counted.any():
                return logits.sum() * 0
            # What is labelled, as the one row of a batch: the criterion need not know of labels that do not count.
            logits, target = logits.movedim(1, 0)[:, counted][None], target[counted][None]
        if self.regions is None:
            return self.criterion(logits, target.unsqueeze(1) if self.with_channel else target)
        losses = []
        for logit, region in zip(logits.unbind(1), self.regions, strict=True):
            pair = torch.stack([torch.zeros_like(logit), logit], 1)  # the softmax of both is the sigmoid of one
            inside = _among(target, region).long()
            losses.append(self.criterion(pair, inside.unsqueeze(1) if self.with_channel else inside))
        return torch.stack(losses).mean()


def _among(labels: Tensor, part: Sequence[int]) -> Tensor:
    return torch.isin(labels, torch.tensor(part, device=labels.device))


def _window(image: Tensor, size: tuple[int, ...], start: tuple[int, ...]) -> Tensor:
    """A window of a volume; beyond its end there are zeros."""
    part = image[(slice(None), *(slice(a, a + n) for a, n in zip(start, size, strict=True)))]
    short = [n - have for n, have in zip(size, part.shape[1:], strict=True)]
    return F.pad(part, [side for gap in reversed(short) for side in (0, gap)])


def _coarser(label: Tensor, logits: Tensor) -> Tensor:
    size = logits.shape[2:]
    if size == label.shape[1:]:
        return label
    return F.interpolate(label[:, None].float(), size=size, mode="nearest-exact")[:, 0].long()


def _start_from(network: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a readable safetensors file; write one with convert-weights") from error
    own = network.state_dict()
    for name, value in own.items():
        if name not in state or state[name].shape != value.shape:
            what = "missing" if name not in state else f"of shape {tuple(state[name].shape)}, not {tuple(value.shape)}"
            raise ValueError(f"{path}: {name} is {what}; the file was written for other options")
    network.load_state_dict(state, strict=False)
