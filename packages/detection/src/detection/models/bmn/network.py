"""BMN: where events begin and end in a video, from features in time; with class-semantics attention (CSA).

Papers: Lin, Liu, Li, Ding, Wen, BMN: Boundary-Matching Network for Temporal Action Proposal Generation, ICCV 2019,
arXiv 1907.09702. Sridhar, Quader, Muralidharan, Li, Dai, Lu, Class Semantics-based Attention for Action Detection, ICCV
2021, arXiv 2109.02613. Official: https://github.com/JJBOY/BMN-Boundary-Matching-Network, ``models.py`` (MIT), a widely
used port of BMN; of CSA no code was released.

Same: all layers, their sizes and names of BMN, and its numbers. Different: boundary matching is a gather
(`detection.models.bmn.matching`), so no mask of 122 MiB is a parameter; ``longest`` bounds the length of events, as the
paper does for THUMOS-14.

**CSA is a reconstruction.** Known is: attention over channels and attention over time, both learned from the
class-semantics features R alone, are applied to the features F of the encoder, and the two results are fused. Which
layers learn them is not: here two layers on the mean of R over time, and one convolution over R; each begins with all
weights 1/2, so that the sum begins as the host. SE (Hu et al., CVPR 2018) learns channel weights from F and may stand
beside it.

Numbers are checked in ``tests/models/bmn/test_network.py`` against a plain network. Features (B, F, T), semantics
(B, R, T) → map (B, 2, T, T) of [start, end], its scores of regression and classification; start and end (B, T).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attn_core import weights
from attn_core.catalog import Card, Entry
from detection.models.bmn.matching import BoundaryMatching

Fusion = Literal["sum", "mean", "max"]
FUSIONS = ("sum", "mean", "max")


class Boundaries(NamedTuple):
    """What a `BMN` gives, all in [0, 1]: scores of pairs (start, end), of starts, of ends."""

    pairs: Float[Tensor, "B 2 T T"]
    start: Float[Tensor, "B T"]
    end: Float[Tensor, "B T"]


class ClassSemanticsAttention(nn.Module):
    """Weighs features over channels and over time, by what class-semantics features say. A reconstruction.

    w_c = σ(W₂ ReLU(W₁ mean_t R)), w_t = σ(conv R); F·w_c and F·w_t are fused.

    Args:
        channels: of F. semantics: channels of R.
        fuse: ``"sum"``, ``"mean"`` or ``"max"`` of the two.
        reduction: R's channels per hidden unit of w_c. kernel: steps of the convolution, odd.
        per_channel: weights over time for each channel apart, not one for all.

    Shapes: F (B, C, T), R (B, R, T) → (B, C, T).
    Raises: ValueError for an unknown fusion, an even kernel, sizes below 1; for R of another shape.
    """

    def __init__(
        self,
        channels: int,
        semantics: int,
        *,
        fuse: Fusion = "sum",
        reduction: int = 4,
        kernel: int = 3,
        per_channel: bool = False,
    ) -> None:
        super().__init__()
        if fuse not in FUSIONS:
            raise ValueError(f"ClassSemanticsAttention: fuse must be 'sum', 'mean' or 'max', got fuse={fuse!r}")
        for name, value in {"channels": channels, "semantics": semantics, "reduction": reduction}.items():
            if value < 1:
                raise ValueError(f"ClassSemanticsAttention: {name} must be at least 1, got {name}={value}")
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"ClassSemanticsAttention: kernel must be odd, got kernel={kernel}")
        self.fuse, self.semantics = fuse, semantics
        hidden = max(semantics // reduction, 1)
        self.squeeze = nn.Linear(semantics, hidden)
        self.excite = nn.Linear(hidden, channels)
        self.time = nn.Conv1d(semantics, channels if per_channel else 1, kernel, padding=kernel // 2)
        for last in (self.excite, self.time):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Float[Tensor, "B C T"], semantics: Float[Tensor, "B R T"]) -> Float[Tensor, "B C T"]:
        """The fused features."""
        if semantics.ndim != 3 or semantics.shape != (len(x), self.semantics, x.shape[2]):
            raise ValueError(
                f"ClassSemanticsAttention: semantics must be ({len(x)}, {self.semantics}, {x.shape[2]}), "
                f"got {tuple(semantics.shape)}"
            )
        by_channel, by_time = self.attentions(semantics)
        one, other = x * by_channel, x * by_time
        if self.fuse == "max":
            return torch.maximum(one, other)
        return (one + other) / (2 if self.fuse == "mean" else 1)

    def attentions(self, semantics: Float[Tensor, "B R T"]) -> tuple[Float[Tensor, "B C 1"], Float[Tensor, "B _ T"]]:
        """Weights over channels, and over time."""
        by_channel = self.excite(torch.relu(self.squeeze(semantics.mean(2)))).sigmoid().unsqueeze(2)
        return by_channel, self.time(semantics).sigmoid()


class SqueezeExcitation(nn.Module):
    """Channel weights from the features themselves. (B, C, T) → (B, C, T)."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, max(channels // reduction, 1))
        self.excite = nn.Linear(max(channels // reduction, 1), channels)

    def forward(self, x: Float[Tensor, "B C T"]) -> Float[Tensor, "B C T"]:
        """Each channel times a number in (0, 1)."""
        return x * self.excite(torch.relu(self.squeeze(x.mean(2)))).sigmoid().unsqueeze(2)


class BMN(nn.Module):
    """See the module.

    Args:
        features: channels of the input. steps: T.
        width, pair_width, map_width: channels of convolutions over time, of pairs, of their map.
        bins, per_bin, ratio, longest: of `BoundaryMatching`.
        csa: fusion of class-semantics attention behind the encoder; None is BMN as published.
        semantics: channels of R; None takes the input for R, as where features are class scores.
        se: squeeze and excitation behind the encoder.

    Raises: ValueError for a width that 4 does not divide (the published convolutions have four groups), semantics
        without csa, and as `BoundaryMatching` and `ClassSemanticsAttention`; for features of another shape.
    """

    def __init__(
        self,
        features: int = 400,
        steps: int = 100,
        *,
        width: int = 256,
        pair_width: int = 512,
        map_width: int = 128,
        bins: int = 32,
        per_bin: int = 3,
        ratio: float = 0.5,
        longest: int | None = None,
        csa: Fusion | None = None,
        semantics: int | None = None,
        se: bool = False,
    ) -> None:
        super().__init__()
        for name, value in {"features": features, "width": width}.items():
            if value < 4 or value % 4:
                raise ValueError(f"BMN: {name} must be a multiple of 4, got {name}={value}")
        if map_width < 1:
            raise ValueError(f"BMN: map_width must be at least 1, got map_width={map_width}")
        if semantics is not None and csa is None:
            raise ValueError(f"BMN: semantics={semantics} are read by csa only; give csa='sum', 'mean' or 'max'")
        self.features, self.steps, self.semantics = features, steps, semantics
        self.x_1d_b = nn.Sequential(
            nn.Conv1d(features, width, 3, padding=1, groups=4), nn.ReLU(),
            nn.Conv1d(width, width, 3, padding=1, groups=4), nn.ReLU(),
        )  # fmt: skip
        self.se = SqueezeExcitation(width) if se else None
        meaning = features if semantics is None else semantics
        self.csa = None if csa is None else ClassSemanticsAttention(width, meaning, fuse=csa)
        self.x_1d_s, self.x_1d_e = (
            nn.Sequential(
                nn.Conv1d(width, width, 3, padding=1, groups=4), nn.ReLU(), nn.Conv1d(width, 1, 1), nn.Sigmoid()
            )
            for _ in range(2)
        )
        self.x_1d_p = nn.Sequential(nn.Conv1d(width, width, 3, padding=1), nn.ReLU())
        self.matching = BoundaryMatching(
            width, pair_width, steps, bins=bins, per_bin=per_bin, ratio=ratio, longest=longest
        )
        self.x_2d_p = nn.Sequential(
            nn.Conv2d(pair_width, map_width, 1), nn.ReLU(),
            nn.Conv2d(map_width, map_width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(map_width, map_width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(map_width, 2, 1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Float[Tensor, "B F T"], semantics: Float[Tensor, "B R T"] | None = None) -> Boundaries:
        """Scores of pairs, starts and ends; those of pairs that cannot be mean nothing."""
        if x.ndim != 3 or x.shape[1:] != (self.features, self.steps):
            raise ValueError(f"BMN: features must be (B, {self.features}, {self.steps}), got {tuple(x.shape)}")
        if self.semantics is not None and semantics is None:
            raise ValueError(f"BMN: this network reads semantics of {self.semantics} channels beside the features")
        encoded = self.x_1d_b(x)
        if self.se is not None:
            encoded = self.se(encoded)
        if self.csa is not None:
            encoded = self.csa(encoded, x if self.semantics is None else semantics)
        start, end = (head(encoded).squeeze(1) for head in (self.x_1d_s, self.x_1d_e))
        return Boundaries(self._pairs(self.x_1d_p(encoded)), start, end)

    def valid(self, device: torch.device | str = "cpu") -> Float[Tensor, "T T"]:
        """1 where a pair [start, end] can be, 0 elsewhere."""
        plan = self.matching.plan(torch.float32, torch.device(device))
        found = torch.zeros(self.steps, self.steps, device=device)
        found[plan.start, plan.end] = 1
        return found

    def _pairs(self, x: Float[Tensor, "B C T"]) -> Float[Tensor, "B 2 T T"]:
        """Pairs that cannot be sampled nothing: of them the first convolutions see the biases, all the same."""
        first: Any = self.x_2d_p[0]
        rows = torch.relu(self.matching(x))  # (B, P, O)
        nothing = torch.relu(self.matching.bias).to(rows.dtype)
        weight = first.weight.flatten(1)
        rows = nn.functional.linear(rows, weight, first.bias)
        empty = nn.functional.linear(nothing, weight, first.bias)
        plan = self.matching.plan(torch.promote_types(rows.dtype, torch.float32), x.device)
        everywhere = empty[None, :, None].expand(len(x), -1, self.steps**2)
        maps = everywhere.index_copy(2, plan.start * self.steps + plan.end, rows.mT)
        maps = maps.unflatten(2, (self.steps, self.steps))
        return self.x_2d_p[1:](maps)


# ours → official
KEY_MAP = {"official": ((r"^matching\.", "x_3d_p.0."),)}


def load_official(model: BMN, source: Mapping[str, Any] | str | Path, *, ignore: Sequence[str] = ()) -> BMN:
    """Load an official checkpoint, every parameter or none; its mask of samples is left out.

    Args:
        source: a file, ``hf://owner/repo/file``, or what it holds. ignore: beginnings of our names that may differ,
            such as ``("csa.",)``, of which there are no official weights.

    Raises: ValueError naming what is missing, unknown or of another shape.
    """
    checkpoint = weights.read(source, prefixes=("module.",))
    names = weights.fitting_names(model, KEY_MAP, checkpoint)
    return weights.fill(model, checkpoint, names, ignore=ignore, fit=_fit, computed=("sample_mask",))


def _fit(name: str, value: Tensor) -> Tensor:
    """(O, C, N, 1, 1) of the convolution over bins → (N, O, C)."""
    return value.flatten(2).permute(2, 0, 1) if name == "matching.weight" and value.ndim == 5 else value


CARD = Card(
    family="BMN",
    paper="1907.09702",
    code="https://github.com/JJBOY/BMN-Boundary-Matching-Network",
    license="MIT",
    test="models/bmn/test_network.py",
)
CSA_CARD = Card(family="CSA", paper="2109.02613", code="", license="", test="models/bmn/test_network.py")
SMALL: dict[str, Any] = {"width": 16, "pair_width": 24, "map_width": 12, "bins": 4}
THUMOS: dict[str, Any] = {"steps": 128, "longest": 64}
ENTRIES: list[Entry[nn.Module]] = [
    Entry("bmn_activitynet", BMN, CARD("100 steps of 400 class scores", "ActivityNet-1.3 AR@100 75.01, AUC 67.10")),
    Entry("bmn_thumos", partial(BMN, **THUMOS), CARD("windows of 128 snippets, events of up to 64"), (BMN,)),
    Entry(
        "bmn_csa_activitynet",
        partial(BMN, csa="sum"),
        CSA_CARD("BMN with class-semantics attention, a reconstruction", "ActivityNet-1.3 average mAP 36.25"),
        (BMN,),
    ),
    Entry(
        "bmn_csa_thumos",
        partial(BMN, **THUMOS, csa="sum"),
        CSA_CARD("BMN with class-semantics attention, a reconstruction", "THUMOS-14 average mAP 47.5 (TSN)"),
        (BMN,),
    ),
    Entry("test_bmn", partial(BMN, 8, 10, **SMALL), CARD("for tests"), (BMN,)),
    Entry("test_bmn_csa", partial(BMN, 8, 10, csa="sum", **SMALL), CSA_CARD("for tests"), (BMN,)),
]
