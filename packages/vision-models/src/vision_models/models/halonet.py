"""HaloNet: bottleneck blocks whose 3×3 convolution is attention to a block and a border around it.

Paper: Vaswani et al., Scaling Local Self-Attention for Parameter Efficient Visual Backbones, CVPR 2021, arXiv
2103.12731. There is no official code. Weights are timm's, ``timm/models/byoanet.py`` and ``byobnet.py``, with ResNets
around the attention; parameters have timm's names but for ``stages.i.blocks.j`` and linear layers for 1×1 convolutions
in the attention. H0 to H7 follow the paper's tables 1 and 3; their parameter counts are the published ones. What the
paper leaves open (ReLU, a 7×7 stem with max pooling) is as in timm's ``halonet_h1``, whose first stage has 8 heads and
not the paper's 4 (``num_heads=8`` is that model).

The same as in timm: every number, odd ones included. Positions outside the image stay in the softmax, with key and
value 0; the position logits are not scaled; strided queries count their own rows, not those of the keys.

What differs: keys are not copied (``halo_attention.py``); maps stay channels-last; any size works, where timm needs
multiples of 8·32 pixels; ``border="masked"`` hides what is outside.

Numbers are checked in ``tests/models/test_halonet.py`` against timm.

Shapes: image (B, 3, Y, X) → logits (B, num_classes); maps (B, C_i, ⌈Y/s⌉, ⌈X/s⌉) with s = 4, 8, 16, 32.
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import BatchNormAct2d, ClassifierHead, ConvNormAct, DropPath, EcaModule, SEModule, make_divisible
from timm.models import checkpoint_seq, generate_default_cfgs
from torch import Tensor, nn

from attn_core.catalog import Card
from attn_core.weights import KeyMap
from vision_models.backbone import StagedBackbone
from vision_models.layers.halo_attention import Border, BottleneckAttention, HaloAttention
from vision_models.layers.lambda_layer import LambdaLayer
from vision_models.registration import pretrained_cfg, timm_entries

__all__ = ["HaloNet"]

BlockKind = Literal["conv", "halo", "bottleneck", "lambda"]
KINDS = ("conv", "halo", "bottleneck", "lambda")
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


class Block(nn.Module):
    """1×1 convolution, the middle, 1×1 convolution, residual. (B, C, Y, X) → (B, dim, Y/stride, X/stride).

    Args:
        middle: what works on ``mid`` channels and gives ``mid_out``; submodules get the names of ``middle``.
        shortcut: a 1×1 convolution if the shape changes, None for no residual.
    """

    def __init__(
        self,
        in_dim: int,
        mid: int,
        mid_out: int,
        dim: int,
        middle: dict[str, nn.Module],
        shortcut: nn.Module | None,
        act: type[nn.Module] | None,
        drop_path: float,
        conv: Any,
    ) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.conv1_1x1 = conv(in_dim, mid, 1)
        self.middle = nn.Sequential(OrderedDict(middle))
        self.conv3_1x1 = conv(mid_out, dim, 1, apply_act=False)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.act = nn.Identity() if act is None else act()

    def forward(self, x: Tensor) -> Tensor:
        out = self.drop_path(self.conv3_1x1(self.middle(self.conv1_1x1(x))))
        if self.shortcut is not None:
            out = out + self.shortcut(x)
        return self.act(out)


class HaloStage(nn.Module):
    """Blocks, the first with the stride, and in the last stage perhaps one more convolution. NCHW → NCHW."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.final_conv: nn.Module = nn.Identity()
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing:
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.final_conv(x)


class HaloNet(StagedBackbone):
    """The classification network and, through timm's feature interfaces, a backbone for any resolution.

    Args:
        blocks: the kind of each block of each of four stages: ``"conv"``, ``"halo"``, ``"bottleneck"`` or ``"lambda"``.
        dims: channels that each stage gives.
        bottle_ratio: channels in the middle of a block, relative to those it gives, one value or one per stage.
        bottle_in: relative to those it receives instead.
        stem: three 3×3 convolutions, one of 7×7 (each with total stride 4), or one of 3×3 with stride 2.
        stem_dim: channels that the stem gives.
        stem_pool: the stem's second stride is max pooling.
        act: activation everywhere.
        group_size: channels of a group of the 3×3 convolutions; 0 for one group.
        channel_attn: squeeze-and-excitation or efficient channel attention behind 3×3 convolutions.
        se_ratio: inner width of squeeze-and-excitation.
        linear_out: no activation behind the residual.
        project_shortcut: a 1×1 convolution where the residual changes its shape; otherwise there is none.
        num_heads: of the attention, one value or one per stage.
        head_dim: of queries and keys; by default ``qk_ratio`` times the channels in the middle, shared by the heads.
        value_ratio: channels of the values relative to those in the middle (r_v of the paper).
        block_size, halo_size: tokens of a block's side, and of the border around it.
        border: ``"zero"`` (trained so) or ``"masked"``: whether positions outside the image take part.
        img_size: image that the tables of ``"bottleneck"`` blocks are made for.
        final_dim: channels of one more 1×1 convolution at the end; 0 for none.

    Raises:
        ValueError: options that contradict each other or the widths.
    """

    undecayed = ("height_rel", "width_rel")

    # Whole: each of its options is checked and used once; parts would relay them.
    def __init__(
        self,
        blocks: Sequence[Sequence[BlockKind]] = (("halo",) * 3, ("halo",) * 3, ("halo",) * 7, ("halo",) * 3),  # pyright: ignore[reportArgumentType]
        dims: Sequence[int] = (32, 64, 128, 256),
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        bottle_ratio: float | Sequence[float] = 2.0,
        bottle_in: bool = False,
        stem: Literal["tiered", "7x7", "3x3"] = "7x7",
        stem_dim: int = 64,
        stem_pool: bool = True,
        act: Literal["relu", "silu"] = "relu",
        group_size: int = 0,
        channel_attn: Literal["se", "eca"] | None = None,
        se_ratio: float = 1 / 16,
        linear_out: bool = False,
        project_shortcut: bool = True,
        num_heads: int | Sequence[int] = 8,
        head_dim: int | None = None,
        qk_ratio: float = 1.0,
        value_ratio: float = 1.0,
        block_size: int = 8,
        halo_size: int = 3,
        border: Border = "zero",
        img_size: int = 256,
        final_dim: int = 0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        ratios = (bottle_ratio,) * 4 if isinstance(bottle_ratio, (int, float)) else tuple(bottle_ratio)
        heads = (num_heads,) * 4 if isinstance(num_heads, int) else tuple(num_heads)
        for option, values in (("blocks", blocks), ("dims", dims), ("bottle_ratio", ratios), ("num_heads", heads)):
            if len(values) != 4:
                raise ValueError(f"HaloNet: {option} must have one entry for each of 4 stages, got {values}")
        unknown = [kind for stage in blocks for kind in stage if kind not in KINDS]
        if unknown:
            raise ValueError(f"HaloNet: blocks must be of the kinds {', '.join(KINDS)}, got {unknown[0]!r}")
        if block_size < 1 or halo_size < 0:
            raise ValueError(
                f"HaloNet: block_size must be positive, halo_size not negative, got {(block_size, halo_size)}"
            )
        for option, value, known in (
            ("stem", stem, ("tiered", "7x7", "3x3")),
            ("act", act, tuple(ACTIVATIONS)),
            ("channel_attn", channel_attn, ("se", "eca", None)),
            ("border", border, ("zero", "masked")),
        ):
            if value not in known:
                raise ValueError(f"HaloNet: {option} must be one of {known}, got {option}={value!r}")

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.feature_info = []
        act_layer = ACTIVATIONS[act]
        conv = partial(ConvNormAct, norm_layer=nn.BatchNorm2d, act_layer=act_layer, **dd)
        rates = torch.linspace(0, drop_path_rate, sum(map(len, blocks)), device="cpu").tolist()

        def attention(kind: BlockKind, mid: int, out: int, stage: int, stride: int, reduction: int) -> nn.Module:
            if out % heads[stage]:
                raise ValueError(f"HaloNet: num_heads must divide {out} channels, got num_heads={heads[stage]}")
            if kind == "halo":
                options: dict[str, Any] = {"block": block_size, "halo": halo_size, "border": border, **dd}
                return HaloAttention(
                    mid, out, stride=stride, num_heads=heads[stage], head_dim=head_dim, qk_ratio=qk_ratio, **options
                )
            if kind == "bottleneck":
                side = img_size // reduction
                return BottleneckAttention(mid, stride=stride, num_heads=heads[stage], feat_size=(side, side), **dd)
            return LambdaLayer(mid, stride=stride, num_heads=heads[stage], head_dim=16, radius=13, **dd)

        def block(kind: BlockKind, in_dim: int, dim: int, stage: int, stride: int, reduction: int) -> Block:
            mid = make_divisible((in_dim if bottle_in else dim) * ratios[stage])
            if kind == "conv":
                if group_size and mid % group_size:
                    raise ValueError(f"HaloNet: group_size must divide {mid} channels, got group_size={group_size}")
                mid_out, groups = mid, mid // group_size if group_size else 1
                middle: dict[str, nn.Module] = {"conv2_kxk": conv(mid, mid, 3, stride=stride, groups=groups)}
                if channel_attn == "se":
                    middle["attn"] = SEModule(mid, rd_ratio=se_ratio, **dd)
                elif channel_attn == "eca":
                    middle["attn"] = EcaModule(mid, **dd)
            else:
                mid_out = int(mid * value_ratio) if kind == "halo" else mid
                middle = {
                    "self_attn": attention(kind, mid, mid_out, stage, stride, reduction),
                    "post_attn": BatchNormAct2d(mid_out, act_layer=act_layer, **dd),
                }
            shortcut: nn.Module | None = nn.Identity()
            if in_dim != dim or stride != 1:
                shortcut = conv(in_dim, dim, 1, stride=stride, apply_act=False) if project_shortcut else None
            last_act = None if linear_out else act_layer
            return Block(in_dim, mid, mid_out, dim, middle, shortcut, last_act, rates.pop(0), conv)

        self.stem = _stem(stem, in_chans, stem_dim, stem_pool, conv)
        stages, width, reduction = [], stem_dim, 2 if stem == "3x3" else 4
        for i, (kinds, dim) in enumerate(zip(blocks, dims, strict=True)):
            built = []
            for j, kind in enumerate(kinds):
                stride = 2 if j == 0 and (i > 0 or stem == "3x3") else 1
                built.append(block(kind, width, dim, i, stride, reduction))
                width, reduction = dim, reduction * stride
            stages.append(HaloStage(built))
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
        if final_dim:
            stages[-1].final_conv = conv(width, final_dim, 1)
            self.feature_info[-1]["num_chs"] = width = final_dim
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Identity()
        self.num_features = self.head_hidden_size = width
        self.head = ClassifierHead(width, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.apply(_init)

    def fit_table(self, name: str, value: Tensor) -> Tensor:
        """timm's kernels of lambda layers have a third axis of length 1."""
        return value[..., 0] if name.endswith(".conv_lambda.weight") and value.ndim == 5 else value

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the layer groups for decay of the learning rate with depth, as timm asks; coarse: stages."""
        fine = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.3\.final_conv", (99999,))]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}


def _stem(kind: str, in_chans: int, dim: int, pool: bool, conv: Any) -> nn.Module:
    """Stride 2 at the first convolution; the second stride is pooling or the last convolution's."""
    if kind == "3x3":
        return conv(in_chans, dim, 3, stride=2)
    if kind == "7x7":
        layers = [conv(in_chans, dim, 7, stride=2 if pool else 4)]
    else:
        widths = (3 * dim // 8, dim // 2, dim)
        layers = [
            conv(in_chans, widths[0], 3, stride=2),
            conv(widths[0], widths[1], 3),
            conv(widths[1], widths[2], 3, stride=1 if pool else 2),
        ]
    named: dict[str, nn.Module] = {f"conv{i}": layer for i, layer in enumerate(layers, start=1)}
    if pool:
        named["pool"] = nn.MaxPool2d(3, stride=2, padding=1)
    return nn.Sequential(OrderedDict(named))


def _init(module: nn.Module) -> None:
    """timm's start: variance of the outputs kept, residual branches at 0. Called for the inner modules first."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (HaloAttention, BottleneckAttention, LambdaLayer)):
        module.reset_parameters()
    elif isinstance(module, ClassifierHead) and isinstance(module.fc, nn.Linear):
        nn.init.normal_(module.fc.weight, std=0.01)
        nn.init.zeros_(module.fc.bias)
    elif isinstance(module, Block) and module.shortcut is not None:
        nn.init.zeros_(module.conv3_1x1.bn.weight)


KEY_MAP: KeyMap = {
    "timm": (
        (r"^stages\.3\.final_conv\.", "final_conv."),
        (r"^stages\.(\d)\.blocks\.(\d+)\.(?:middle\.)?", r"stages.\1.\2."),
        (r"\.self_attn\.(height|width)_rel$", r".self_attn.pos_embed.\1_rel"),
    )
}
HaloNet.key_map = KEY_MAP


def _every(step: int, depth: int) -> tuple[BlockKind, ...]:
    """Halo attention in each block number ``step``, 2·``step`` + 1, …, counted from 0, or in the last one."""
    chosen = set(range(step, depth, step + 1)) or {depth - 1}
    return tuple("halo" if i in chosen else "conv" for i in range(depth))


def _mixed(kind: BlockKind, depth: int) -> tuple[BlockKind, ...]:
    """Convolution and ``kind`` in turns."""
    return tuple(kind if i % 2 else "conv" for i in range(depth))


def _conv(depth: int) -> tuple[BlockKind, ...]:
    return ("conv",) * depth


def _halo(depth: int) -> tuple[BlockKind, ...]:
    return ("halo",) * depth


def _paper(
    block: int, halo: int, value: float, out: float, third: int, final: int = 0, conv_stages: int = 0
) -> dict[str, Any]:
    """A network of the paper's table 3: sides, r_v, r_b, depth of stage 3, d_f; convolutions in the first stages."""
    depths = (3, 3, third, 3)
    return {
        "blocks": tuple((_conv if i < conv_stages else _halo)(depth) for i, depth in enumerate(depths)),
        "dims": tuple(int(width * out) for width in (64, 128, 256, 512)),
        "bottle_ratio": 1 / out,
        "num_heads": (4, 8, 8, 8),
        "value_ratio": value,
        "block_size": block,
        "halo_size": halo,
        "final_dim": final,
    }


_RESNET: dict[str, Any] = {"dims": (256, 512, 1024, 2048), "bottle_ratio": 0.25, "stem": "tiered"}
_26 = {**_RESNET, "blocks": (_conv(2), _conv(2), _mixed("halo", 2), _halo(2)), "halo_size": 2}
_50 = {**_RESNET, "act": "silu"}
VARIANTS: dict[str, dict[str, Any]] = {
    "halonet26t": _26,
    "eca_halonext26ts": {**_26, "act": "silu", "group_size": 16, "channel_attn": "eca", "head_dim": 16},
    "sehalonet33ts": {
        **_RESNET,
        "blocks": (_conv(2), _every(2, 3), _every(2, 3), _halo(2)),
        "dims": (256, 512, 1024, 1536),
        "bottle_ratio": (0.25, 0.25, 0.25, 0.333),
        "stem_pool": False,
        "act": "silu",
        "channel_attn": "se",
        "final_dim": 1280,
    },
    "halonet50ts": {
        **_50,
        "blocks": (_conv(3), _every(4, 4), _mixed("halo", 6), _mixed("halo", 3)),
        "num_heads": (8, 4, 8, 8),
    },
    "haloregnetz_b": {
        "blocks": (_conv(2), _conv(6), _every(3, 12), _halo(2)),
        "dims": (48, 96, 192, 288),
        "bottle_ratio": 3.0,
        "bottle_in": True,
        "stem": "3x3",
        "stem_dim": 32,
        "act": "silu",
        "group_size": 16,
        "channel_attn": "se",
        "se_ratio": 0.25,
        "linear_out": True,
        "project_shortcut": False,
        "qk_ratio": 0.33,
        "block_size": 7,
        "halo_size": 2,
        "final_dim": 1536,
    },
    "lamhalobotnet50ts_256": {
        **_50,
        "blocks": (_conv(3), _mixed("lambda", 4), _mixed("halo", 6), _mixed("bottleneck", 3)),
        "stem_pool": False,
        "num_heads": (8, 4, 8, 4),
    },
    "halo2botnet50ts_256": {
        **_50,
        "blocks": (_conv(3), _mixed("halo", 4), _mixed("halo", 6), _mixed("bottleneck", 3)),
        "stem_pool": False,
        "num_heads": (8, 8, 8, 4),
    },
    "halonet_h0": _paper(8, 3, 1, 0.5, 7),
    "halonet_h1": _paper(8, 3, 1, 1, 10),
    "halonet_h2": _paper(8, 3, 1, 1.25, 11),
    "halonet_h3": _paper(10, 3, 1, 1.5, 12, 1024),
    "halonet_h4": _paper(12, 2, 1, 3, 12, 1280),
    "halonet_h5": _paper(14, 2, 2.5, 2, 23, 1536),
    "halonet_h6": _paper(8, 4, 3, 2.75, 24, 1536),
    "halonet_h7": _paper(10, 3, 4, 3.5, 26, 2048),
    "halonet_h7_conv1": _paper(10, 3, 4, 3.5, 26, 2048, conv_stages=1),
    "halonet_h7_conv2": _paper(10, 3, 4, 3.5, 26, 2048, conv_stages=2),
    "test_halonet": {
        "blocks": (_conv(1), _mixed("halo", 2), _halo(2), _halo(1)),
        "dims": (32, 48, 64, 96),
        "bottle_ratio": 0.5,
        "stem": "tiered",
        "stem_dim": 16,
        "num_heads": 2,
        "block_size": 4,
        "halo_size": 1,
        "final_dim": 64,
    },
}


def _cfg(size: int = 224, **kwargs: Any) -> dict[str, Any]:
    entries: dict[str, Any] = {
        "crop_pct": 0.94,
        "first_conv": "stem.conv1.conv",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2103.12731",
        "origin_url": "https://github.com/huggingface/pytorch-image-models",
    }
    return pretrained_cfg(size, **{**entries, **kwargs})


# timm's name: tag and what differs from its other models
_TAGS: dict[str, tuple[str, dict[str, Any]]] = {
    "halonet26t": ("a1h_in1k", {"crop_pct": 0.95}),
    "halonet50ts": ("a1h_in1k", {}),
    "sehalonet33ts": ("ra2_in1k", {}),
    "eca_halonext26ts": ("c1_in1k", {}),
    "lamhalobotnet50ts_256": ("a1h_in1k", {"crop_pct": 0.95}),
    "halo2botnet50ts_256": ("a1h_in1k", {"crop_pct": 0.95}),
    "haloregnetz_b": ("ra3_in1k", {"first_conv": "stem.conv", "mean": (0.5,) * 3, "std": (0.5,) * 3}),
}
_SIDES = {"h0": 256, "h1": 256, "h2": 256, "h3": 320, "h4": 384, "h5": 448, "h6": 512, "h7": 600}
default_cfgs = generate_default_cfgs(
    {
        **{
            f"attn_{name}.{tag}": _cfg(224 if name == "haloregnetz_b" else 256, hf_hub_id=f"timm/{name}.{tag}", **extra)
            for name, (tag, extra) in _TAGS.items()
        },
        **{f"{'attn_' * (size == 'h1')}halonet_{size}": _cfg(side) for size, side in _SIDES.items()},
        **{f"halonet_h7_conv{stages}": _cfg(600) for stages in (1, 2)},
        "test_halonet": _cfg(96),
    }
)

CARD = Card(
    family="HaloNet",
    paper="2103.12731",
    code="https://github.com/huggingface/pytorch-image-models",
    license="Apache-2.0",
    test="models/test_halonet.py",
)
CARDS = {
    "halonet26t": CARD("26 layers: 12.5 M parameters, 3.2 G multiply-adds at 256²", "top-1 79.1 %"),
    "halonet50ts": CARD("50 layers: 22.7 M parameters, 5.3 G multiply-adds at 256²", "top-1 81.6 %"),
    "sehalonet33ts": CARD("33 layers, SE: 13.7 M parameters, 3.5 G multiply-adds at 256²", "top-1 81.0 %"),
    "eca_halonext26ts": CARD("26 layers, grouped: 10.8 M parameters, 2.4 G multiply-adds at 256²", "top-1 79.5 %"),
    "haloregnetz_b": CARD("A RegNetZ: 11.7 M parameters, 1.9 G multiply-adds at 224²", "top-1 81.1 %"),
    "lamhalobotnet50ts_256": CARD("Lambda layers: 22.6 M parameters, 5.0 G multiply-adds at 256²", "top-1 81.6 %"),
    "halo2botnet50ts_256": CARD(
        "Whole maps in stage 4: 22.6 M parameters, 5.0 G multiply-adds at 256²", "top-1 82.1 %"
    ),
    "halonet_h0": CARD("The paper's H0: 5.5 M parameters, 2.3 G multiply-adds at 256²", "top-1 77.9 %"),
    "halonet_h1": CARD("The paper's H1: 8.1 M parameters, 2.9 G multiply-adds at 256²", "top-1 79.9 %"),
    "halonet_h2": CARD("The paper's H2: 9.4 M parameters, 3.3 G multiply-adds at 256²", "top-1 80.4 %"),
    "halonet_h3": CARD("The paper's H3: 11.8 M parameters, 6.1 G multiply-adds at 320²", "top-1 81.9 %"),
    "halonet_h4": CARD("The paper's H4: 19.1 M parameters, 11.9 G multiply-adds at 384²", "top-1 83.3 %"),
    "halonet_h5": CARD("The paper's H5: 30.7 M parameters, 32.0 G multiply-adds at 448²", "top-1 84.0 %"),
    "halonet_h6": CARD("The paper's H6: 43.4 M parameters, 52.4 G multiply-adds at 512²", "top-1 84.4 %"),
    "halonet_h7": CARD("The paper's H7: 67.4 M parameters, 110.2 G multiply-adds at 600²", "top-1 84.9 %"),
    "halonet_h7_conv1": CARD("Stage 1 convolves: 67.3 M parameters, 102.4 G multiply-adds at 600²", "top-1 84.6 %"),
    "halonet_h7_conv2": CARD("Stages 1, 2 convolve: 67.0 M parameters, 95.9 G multiply-adds at 600²", "top-1 84.7 %"),
    "test_halonet": CARD("Small enough for tests (< 0.5 M parameters)"),
}
ENTRIES = timm_entries(HaloNet, VARIANTS, CARDS, default_cfgs)
