"""MambaOut: Mamba's block without its state-space model, which leaves a gated convolution; and MambaIn, with it.

Paper: Yu and Wang, MambaOut: Do We Really Need Mamba for Vision?, CVPR 2025, arXiv 2405.07992. Official code:
yuweihao/MambaOut, ``models/mambaout.py``; timm has it too, with five networks of its own (``…_rw``).

The same as there: every number. Of the channels behind a block's first projection the last ones are convolved and the
others are not; ``conv_ratio`` counts the convolved ones against the block's width. There is one residual and no MLP.

What differs: the three parts of that projection are computed apart where nobody derives, on a CPU, so that the gate's
GELU is fused, the convolution reads memory without gaps, and nothing is concatenated. ``ssm=True`` puts the state-space
model back behind each convolution ("MambaIn"), for the paper's question; every second block reads the map from its
end, so that no token is kept from seeing what comes after it. No weights exist for that.

Numbers are checked in ``tests/models/test_mambaout.py`` against a plain network and against timm's.

Shapes: image (B, 3, Y, X) → logits (B, num_classes); maps (B, C_i, ⌈Y/s⌉, ⌈X/s⌉) with s = 4, 8, 16, 32.
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, LayerScale, SelectAdaptivePool2d
from timm.models import generate_default_cfgs, register_notrace_module
from torch import Tensor, nn

from attn_core import linear
from attn_core.catalog import Card
from attn_core.weights import KeyMap
from vision_models.backbone import Dense, Stage, StagedBackbone
from vision_models.initialization import trunc_normal_
from vision_models.layers.state_space import StateSpace
from vision_models.layers.token_maps import DepthwiseConv, Linear
from vision_models.registration import pretrained_cfg, timm_entries

__all__ = ["MambaOut", "MambaOutDense"]

Act = Literal["gelu", "silu"]
EPS = 1e-6


@register_notrace_module  # chooses by what derives, which FX must not follow
class GatedConvBlock(nn.Module):
    """A residual around fc2(act(gate) · [identity, conv(c)]) of three projections of the norm. (B, Y, X, dim) → same.

    Args:
        hidden: channels of the gate. convolved: how many of the gated ones are convolved.
        ssm: None, or what follows the convolution.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        convolved: int,
        *,
        kernel_size: int,
        act: Act,
        ssm: nn.Module | None,
        layer_scale: float | None,
        drop_path: float,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.parts = (hidden, hidden - convolved, convolved)
        self.act = act
        self.norm = nn.LayerNorm(dim, eps=EPS, **dd)
        self.fc1 = Linear(dim, 2 * hidden, **dd)
        self.conv = DepthwiseConv(convolved, kernel_size, **dd)
        self.ssm = ssm
        self.fc2 = Linear(hidden, dim, **dd)
        self.ls = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        gate, identity, convolved = self.projected(self.norm(x))
        convolved = self.conv(convolved)
        if self.ssm is not None:
            convolved = self.ssm(convolved)
        return x + self.drop_path(self.ls(self.fc2(gated(gate, identity, convolved))))

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gate behind its activation, and what it gates: channels left alone, and channels to be convolved."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.device.type != "cpu" or not self._is_bare:
            gate, identity, convolved = self.fc1(x).split(self.parts, 3)
            return self._activated(gate), identity, convolved
        weight, bias = self.fc1.weight.split(self.parts), self.fc1.bias.split(self.parts)
        if self.act == "gelu":
            gate = linear(x, weight[0], bias[0], "gelu")
        else:
            gate = self._activated(linear(x, weight[0], bias[0]))
        return gate, linear(x, weight[1], bias[1]), linear(x, weight[2], bias[2])

    @property
    def _is_bare(self) -> bool:
        """Whether fc1 is nothing but its weights: no adapter stands in its place, no hook waits for its output."""
        return type(self.fc1) is Linear and not self.fc1._forward_hooks and not self.fc1._forward_pre_hooks

    def _activated(self, gate: Tensor) -> Tensor:
        return F.gelu(gate) if self.act == "gelu" else F.silu(gate)


def gated(gate: Tensor, identity: Tensor, convolved: Tensor) -> Tensor:
    """gate · [identity, convolved] along the channels; in the gate's memory where nobody derives."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gate * torch.cat([identity, convolved], 3)
    gate[..., : identity.shape[3]].mul_(identity)
    gate[..., identity.shape[3] :].mul_(convolved)
    return gate


class Stem(nn.Module):
    """Two 3×3 convolutions of stride 2, each with its norm, a GELU between. (B, 3, Y, X) → (B, dim, Y/4, X/4)."""

    def __init__(self, in_chans: int, dim: int, act: Act, mid_norm: bool, **dd: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd)
        self.norm1 = LayerNorm2d(dim // 2, eps=EPS, **dd) if mid_norm else nn.Identity()
        self.act = nn.GELU() if act == "gelu" else nn.SiLU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd)
        self.norm2 = LayerNorm2d(dim, eps=EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))


class Downsample(nn.Sequential):
    """A 3×3 convolution of stride 2 and a norm behind or before it. (B, C, Y, X) → (B, dim, Y/2, X/2)."""

    def __init__(self, in_dim: int, dim: int, norm_first: bool, **dd: Any) -> None:
        conv = ("conv", nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, **dd))
        norm = ("norm", LayerNorm2d(in_dim if norm_first else dim, eps=EPS, **dd))
        super().__init__(OrderedDict([norm, conv] if norm_first else [conv, norm]))


class MlpHead(nn.Module):
    """Pooling, norm, a hidden layer, perhaps with a norm of its own, classifier. (B, C, Y, X) → (B, num_classes).

    Without pooling, all of it at every token, as a map.
    """

    def __init__(
        self, dim: int, num_classes: int, pool_type: str, drop_rate: float, hidden_norm: bool, **dd: Any
    ) -> None:
        super().__init__()
        self.fc: nn.Module
        self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        self.norm = nn.LayerNorm(dim, eps=EPS, **dd)
        self.num_features = 4 * dim
        hidden: list[tuple[str, nn.Module]] = [("fc", nn.Linear(dim, self.num_features, **dd))]
        hidden.append(("act", nn.GELU()))  # whatever the blocks have
        if hidden_norm:
            hidden.append(("norm", nn.LayerNorm(self.num_features, eps=EPS, **dd)))
        self.pre_logits = nn.Sequential(OrderedDict(hidden))
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()

    def reset(
        self, num_classes: int, pool_type: str | None = None, *, reset_other: bool = False, in_features: int, **dd: Any
    ) -> None:
        """A new classifier; ``reset_other`` leaves it alone behind the pooling, for maps of ``in_features``."""
        if pool_type is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        if reset_other:
            self.norm, self.pre_logits = nn.Identity(), nn.Identity()
            self.num_features = in_features
        self.fc = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        init_conv_and_linear(self.fc)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        x = x.permute(0, 2, 3, 1) if self.global_pool.is_identity() else x
        x = self.drop(self.pre_logits(self.norm(x)))
        x = x if pre_logits else self.fc(x)
        return x.permute(0, 3, 1, 2) if self.global_pool.is_identity() else x


def init_conv_and_linear(module: nn.Module) -> None:
    """Truncated normal weights (0.02) and zero biases; the state-space model's steps as Mamba draws them."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, StateSpace):  # visited behind its linear layers
        module.start()  # pyright: ignore[reportCallIssue]


class MambaOut(StagedBackbone):
    """The classification network and, through timm's feature interfaces, a backbone for any resolution.

    Args:
        depths, dims: blocks and width of each stage.
        expansion: channels of the gate, over the width.
        conv_ratio: convolved channels, over the width; at most ``expansion``.
        kernel_size: of the depthwise convolution, odd.
        act: activation of gate and stem.
        ssm: a state-space model behind each convolution.
        ssm_state: numbers that each of its channels remembers.
        layer_scale: start of the scales of residual branches; None: there are none.
        stem_norm: a norm between the convolutions of the stem.
        down_norm_first: downsampling normalizes before its convolution instead of behind it.
        head_norm: a norm behind the head's hidden layer.

    Raises:
        ValueError: options that contradict each other.
    """

    undecayed = (".A_log", ".ssm.D", ".gamma")

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 576),
        *,
        expansion: float = 8 / 3,
        conv_ratio: float = 1.0,
        kernel_size: int = 7,
        act: Act = "gelu",
        ssm: bool = False,
        ssm_state: int = 16,
        layer_scale: float | None = None,
        stem_norm: bool = True,
        down_norm_first: bool = False,
        head_norm: bool = True,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if len(depths) != len(dims):
            raise ValueError(f"MambaOut: depths and dims must have one entry for each stage, got {depths} and {dims}")
        if act not in get_args(Act):
            raise ValueError(f"MambaOut: act must be 'gelu' or 'silu', got act={act!r}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"MambaOut: kernel_size must be odd, got kernel_size={kernel_size}")
        if any(not 0 < int(conv_ratio * dim) <= int(expansion * dim) for dim in dims):
            raise ValueError(
                f"MambaOut: conv_ratio must leave every stage between one channel and expansion={expansion:.3g} times "
                f"its width, got conv_ratio={conv_ratio}"
            )
        if ssm_state < 1:
            raise ValueError(f"MambaOut: ssm_state must be positive, got ssm_state={ssm_state}")

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = dims[-1]
        self.feature_info = []
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()

        def block(dim: int, number: int) -> GatedConvBlock:
            hidden, convolved = int(expansion * dim), int(conv_ratio * dim)
            scan = StateSpace(convolved, ssm_state, reverse=number % 2 == 1, **dd) if ssm else None
            return GatedConvBlock(dim, hidden, convolved, kernel_size=kernel_size, act=act, ssm=scan,
                                  layer_scale=layer_scale, drop_path=rates.pop(0), **dd)  # fmt: skip

        self.stem = Stem(in_chans, dims[0], act, stem_norm, **dd)
        stages: list[nn.Module] = []
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            downsample = Downsample(dims[i - 1], dim, down_norm_first, **dd) if i else nn.Identity()
            stages.append(Stage(downsample, [block(dim, sum(depths[:i]) + j) for j in range(depth)]))
            self.feature_info.append({"num_chs": dim, "reduction": 4 << i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Identity()  # that of the head follows the pooling
        self.head = MlpHead(dims[-1], num_classes, global_pool, drop_rate, head_norm, **dd)  # pyright: ignore[reportAttributeAccessIssue]
        self.head_hidden_size = self.head.num_features
        self.apply(init_conv_and_linear)

    @property
    def fixed_size(self) -> str:
        """Why an exported graph serves one image size alone; empty where it serves all."""
        scans = any(isinstance(module, StateSpace) for module in self.modules())
        return "an exported scan has one step for each token" if scans else ""


class MambaOutDense(Dense, MambaOut):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Backbone for detection and segmentation: a map for each stage, each with a LayerNorm of its own on the way out.

    Args:
        variant: name of the classification variant to start from; ``options`` override its constructor arguments.

    Shapes: image (B, 3, Y, X) → tuple of (B, C_i, ⌈Y/s⌉, ⌈X/s⌉), s = 4, 8, 16, 32.
    Raises: ValueError for an unknown variant.
    """

    out_eps = EPS

    def __init__(self, variant: str = "mambaout_tiny", **options: Any) -> None:
        super().__init__(variant, **options)
        self.reset_classifier(0, "", reset_other=True)  # the head's hidden layer would be left over


# timm's names are ours.
KEY_MAP: KeyMap = {
    "mambaout": (
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
        (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
        (r"^head\.norm\.", "norm."),
        (r"^head\.pre_logits\.norm\.", "head.norm."),
        (r"^head\.pre_logits\.fc\.", "head.fc1."),
        (r"^head\.fc\.", "head.fc2."),
    ),
}
MambaOut.key_map = KEY_MAP

_FEMTO: dict[str, Any] = {"dims": (48, 96, 192, 288)}
_DEEP: dict[str, Any] = {"depths": (3, 4, 27, 3)}
_BASE: dict[str, Any] = {**_DEEP, "dims": (128, 256, 512, 768)}
# timm asks for scales of 1e-6, and starts them at 1e-5.
_RW: dict[str, Any] = {"stem_norm": False, "down_norm_first": True, "head_norm": False, "layer_scale": 1e-5}
_WIDE: dict[str, Any] = {**_BASE, **_RW, "expansion": 3.0, "conv_ratio": 1.5, "act": "silu"}
_TEST: dict[str, Any] = {"depths": (1, 2, 2, 1), "dims": (12, 16, 24, 32)}
VARIANTS: dict[str, dict[str, Any]] = {
    "mambaout_femto": _FEMTO,
    "mambaout_kobe": {**_FEMTO, "depths": (3, 3, 15, 3)},
    "mambaout_tiny": {},
    "mambaout_small": _DEEP,
    "mambaout_base": _BASE,
    "mambaout_small_rw": {**_DEEP, **_RW},
    "mambaout_base_short_rw": {**_BASE, **_RW, "depths": (3, 3, 25, 3), "expansion": 3.0, "conv_ratio": 1.25},
    "mambaout_base_tall_rw": {**_BASE, **_RW, "depths": (3, 4, 30, 3), "expansion": 2.5, "conv_ratio": 1.25},
    "mambaout_base_wide_rw": _WIDE,
    "mambaout_base_plus_rw": {**_WIDE, "depths": (3, 4, 30, 3)},
    "test_mambaout": {**_TEST, "conv_ratio": 0.75},
    "test_mambain": {**_TEST, **_RW, "layer_scale": 0.5, "act": "silu", "ssm": True, "ssm_state": 4},
}
MambaOutDense.variants = VARIANTS


def _cfg(**entries: Any) -> dict[str, Any]:
    return pretrained_cfg(
        224,
        **{
            "crop_pct": 1.0,
            "first_conv": "stem.conv1",
            "license": "apache-2.0",
            "paper_ids": "arXiv:2405.07992",
            "origin_url": "https://github.com/yuweihao/MambaOut",
            **entries,
        },
    )


# timm's tag of the weights behind each name, and settings of them.
_TAGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("in1k", {}) for name in VARIANTS if not name.startswith("test_") and not name.endswith("_rw")},
    "mambaout_small_rw": ("sw_e450_in1k", {}),
    **{f"mambaout_base_{shape}_rw": ("sw_e500_in1k", {"crop_pct": 0.95}) for shape in ("short", "tall", "wide")},
    "mambaout_base_plus_rw": ("sw_e150_in12k_ft_in1k", {}),
}
default_cfgs = generate_default_cfgs(
    {
        **{
            f"attn_{name}.{tag}": _cfg(hf_hub_id=f"timm/{name}.{tag}", **entries)
            for name, (tag, entries) in _TAGS.items()
        },
        "attn_test_mambaout": _cfg(),
        "test_mambain": _cfg(),
    }
)

CARD = Card(
    family="MambaOut",
    paper="2405.07992",
    code="https://github.com/yuweihao/MambaOut",
    license="Apache-2.0",
    test="models/test_mambaout.py",
)
_TIMM = "timm's own"
CARDS = {
    "mambaout_femto": CARD("7.3 M parameters, 1.2 G multiply-adds at 224²", "top-1 78.9 %"),
    "mambaout_kobe": CARD("9.1 M parameters, 1.5 G multiply-adds at 224²", "top-1 80.0 %"),
    "mambaout_tiny": CARD("26.5 M parameters, 4.5 G multiply-adds at 224²", "top-1 82.7 %"),
    "mambaout_small": CARD("48.5 M parameters, 9.0 G multiply-adds at 224²", "top-1 84.1 %"),
    "mambaout_base": CARD("84.8 M parameters, 15.8 G multiply-adds at 224²", "top-1 84.2 %"),
    "mambaout_small_rw": CARD(f"{_TIMM}: 48.5 M parameters, 9.0 G multiply-adds at 224²"),
    "mambaout_base_short_rw": CARD(f"{_TIMM}: 88.8 M parameters, 16.3 G multiply-adds at 224²"),
    "mambaout_base_tall_rw": CARD(f"{_TIMM}: 86.5 M parameters, 16.2 G multiply-adds at 224²"),
    "mambaout_base_wide_rw": CARD(f"{_TIMM}: 94.5 M parameters, 17.8 G multiply-adds at 224²"),
    "mambaout_base_plus_rw": CARD(f"{_TIMM}: 101.7 M parameters, 19.2 G multiply-adds at 224²"),
    "test_mambaout": CARD("Small enough for tests (< 0.5 M parameters)"),
    "test_mambain": CARD("MambaIn: small enough for tests (< 0.5 M parameters)"),
}
ENTRIES = timm_entries(MambaOut, VARIANTS, CARDS, default_cfgs)
