"""Sentence Attention Blocks: a segmenter whose feature channels a sentence chooses.

Paper: Sentence Attention Blocks for Answer Grounding, Khoshsirat and Kambhamettu, ICCV 2023 (pp. 6080–6090). Official
code: https://github.com/khoshsirat/embedding-attention-blocks, ``model.py`` (no licence, no weights, no training).

The same: a block for each scale (Linear, LayerNorm, ReLU, Linear, softmax over channels, times the map), instance
normalization of the picture with running statistics, features of an EfficientNet in front of every stride and at the
end, merged from the coarsest up by 1×1 convolutions and batch norms, dropout, a 1×1 classifier, bilinear resizing.
What differs: any backbone of timm with ``features_only`` (``tf_efficientnet_b0`` to ``b7`` are the official ones, whose
weights `load_official` renames); channels are the backbone's own, where the official table is wrong for b0 to b2, which
crash there; the sentence is a vector of any encoder (``text_dim``, 384 of all-MiniLM-L6-v2), by default
`vlm_tools.data.hashed_words`; running averages of the backbone's norms move with timm's momentum. The softmax scales
maps down by the number of channels, as published.

Numbers are checked in ``tests/models/test_sentence_blocks.py`` (a plain network written anew).

Shapes: image (B, 3, Y, X), text (B, E) → logits (B, K, Y, X).
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from attn_core import weights
from attn_core.catalog import Card, Entry


class SentenceAttention(nn.Module):
    """A sentence's weights for the channels of a map: (B, C, Y, X), (B, E) → (B, C, Y, X)."""

    def __init__(self, text_dim: int, channels: int) -> None:
        super().__init__()
        middle = 4 * text_dim
        self.attention = nn.Sequential(
            nn.Linear(text_dim, middle), nn.LayerNorm(middle), nn.ReLU(), nn.Linear(middle, channels), nn.Softmax(-1)
        )

    def forward(self, image: Float[Tensor, "B C Y X"], text: Float[Tensor, "B E"]) -> Float[Tensor, "B C Y X"]:
        """Channels times their weights, which sum to 1."""
        return image * self.attention(text)[:, :, None, None]


class Merge(nn.Module):
    """A coarse map brought to a fine one's channels and size, and added: both (B, C, Y, X) of their own sizes."""

    def __init__(self, coarse: int, fine: int) -> None:
        super().__init__()
        self.low_res_conv = nn.Sequential(nn.Conv2d(coarse, fine, 1, bias=False), nn.BatchNorm2d(fine))

    def forward(self, coarse: Float[Tensor, "B C V U"], fine: Float[Tensor, "B D Y X"]) -> Float[Tensor, "B D Y X"]:
        """ReLU of the sum."""
        return F.relu(resized(self.low_res_conv(coarse), fine.shape[2:]) + fine)


class SentenceBlocks(nn.Module):
    """The segmenter.

    Args:
        backbone: a name of timm's that offers ``features_only``.
        text_dim: width of a sentence's vector.
        num_classes: maps to predict.
        dropout: in front of the classifier.
        pretrained: with timm's weights, downloaded once.

    Raises:
        ValueError: timm is not installed or does not know the backbone, or it offers no features; a dropout outside
            [0, 1), fewer than one class or text dimension.
    """

    def __init__(
        self,
        backbone: str = "tf_efficientnet_b7",
        *,
        text_dim: int = 384,
        num_classes: int = 1,
        dropout: float = 0.5,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("text_dim", text_dim), ("num_classes", num_classes)):
            if value < 1:
                raise ValueError(f"SentenceBlocks: {name} must be at least 1, got {name}={value}")
        if not 0 <= dropout < 1:
            raise ValueError(f"SentenceBlocks: dropout must lie in [0, 1), got dropout={dropout}")
        self.text_dim = text_dim
        self.init_norm = nn.InstanceNorm2d(3, track_running_stats=True)
        self.backbone: Any = _features(backbone, pretrained)
        channels: list[int] = self.backbone.feature_info.channels()
        self.sentence_attentions = nn.ModuleList(SentenceAttention(text_dim, count) for count in channels)
        self.merge_blocks = nn.ModuleList(Merge(coarse, fine) for fine, coarse in itertools.pairwise(channels))
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(channels[0], num_classes, 1)

    def forward(self, image: Float[Tensor, "B 3 Y X"], text: Float[Tensor, "B E"]) -> Float[Tensor, "B K Y X"]:
        """Logits of the picture's size.

        Raises:
            ValueError: a sentence's vector of another width.
        """
        if text.shape[-1] != self.text_dim:
            raise ValueError(f"SentenceBlocks: text must be (B, {self.text_dim}), got {tuple(text.shape)}")
        maps = self.backbone(self.init_norm(image))
        maps = [block(features, text) for block, features in zip(self.sentence_attentions, maps, strict=True)]
        merged = maps[-1]
        for merge, fine in zip(reversed(self.merge_blocks), reversed(maps[:-1]), strict=True):
            merged = merge(merged, fine)
        return resized(self.classifier(self.dropout(merged)), image.shape[2:])


def resized(x: Float[Tensor, "B C Y X"], size: Sequence[int]) -> Float[Tensor, "B C V U"]:
    """Bilinear, corners not aligned."""
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=False)


def _features(name: str, pretrained: bool) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise ValueError(
            "SentenceBlocks: timm, whose backbones it uses, is not installed; pip install 'vlm-tools[train]'"
        ) from None
    try:
        return timm.create_model(name, features_only=True, pretrained=pretrained)
    except (RuntimeError, AttributeError, ValueError) as error:
        reason = str(error).split("\n", 1)[0][:160]
        raise ValueError(f"SentenceBlocks: timm offers no features of backbone={name!r} ({reason})") from None


def load_official(
    model: SentenceBlocks, source: Mapping[str, Any] | str | Path, *, ignore: Sequence[str] = ()
) -> SentenceBlocks:
    """Copy a checkpoint of the official code, or one with our names, into ``model``, every parameter or none.

    Args:
        source: a file, ``hf://owner/repo/file``, or a state dict.
        ignore: beginnings of our parameter names that may differ or be missing: ``("classifier",)``.

    Raises:
        ValueError: names or shapes do not fit; a backbone that the official code does not have.
    """
    checkpoint = weights.read(source, prefixes=("module.",))
    ours = {name: name for name in model.state_dict()}
    official = official_names(model)
    names = max(ours, official, key=lambda known: len(known.keys() & checkpoint.tensors.keys()))
    return weights.fill(model, checkpoint, names, ignore=ignore)


def official_names(model: SentenceBlocks) -> dict[str, str]:
    """Official name → ours: blocks of an EfficientNet are counted there through all stages."""
    lengths = [len(stage) for stage in getattr(model.backbone, "blocks", ())]
    pairs = [*KEY_MAP["efficientnet"]]
    for stage, length in enumerate(lengths):
        for place in range(length):
            number = sum(lengths[:stage]) + place
            parts = KEY_MAP["first stage" if stage == 0 else "stage"]
            block = rf"^backbone\.blocks\.{stage}\.{place}\."
            pairs += [(block + ours, f"backbone._blocks.{number}.{theirs}") for ours, theirs in parts]
    return weights.official_names(model, pairs)


KEY_MAP: weights.KeyMap = {
    "efficientnet": ((r"^backbone\.conv_stem\.", "backbone._conv_stem."), (r"^backbone\.bn1\.", "backbone._bn0.")),
    # without a widening convolution
    "first stage": (
        (r"conv_dw\.", "_depthwise_conv."),
        (r"bn1\.", "_bn1."),
        (r"se\.conv_reduce\.", "_se_reduce."),
        (r"se\.conv_expand\.", "_se_expand."),
        (r"conv_pw\.", "_project_conv."),
        (r"bn2\.", "_bn2."),
    ),
    "stage": (
        (r"conv_pw\.", "_expand_conv."),
        (r"bn1\.", "_bn0."),
        (r"conv_dw\.", "_depthwise_conv."),
        (r"bn2\.", "_bn1."),
        (r"se\.conv_reduce\.", "_se_reduce."),
        (r"se\.conv_expand\.", "_se_expand."),
        (r"conv_pwl\.", "_project_conv."),
        (r"bn3\.", "_bn2."),
    ),
}

CARD = Card(
    family="Sentence Attention Blocks",
    paper="https://openaccess.thecvf.com/content/ICCV2023/html/Khoshsirat_Sentence_Attention_Blocks_for_Answer_Grounding_ICCV_2023_paper.html",
    code="https://github.com/khoshsirat/embedding-attention-blocks",
    license="",
    test="models/test_sentence_blocks.py",
)
ENTRIES = [
    Entry(
        "sentence_blocks",
        SentenceBlocks,
        CARD("a sentence chooses the channels of any timm backbone; EfficientNet-b7 by default, as published"),
    ),
    Entry(
        "sentence_blocks_b3",
        partial(SentenceBlocks, "tf_efficientnet_b3"),
        CARD("the same on EfficientNet-b3, the smallest that runs in the official code"),
    ),
    Entry(
        "test_sentence_blocks",
        partial(SentenceBlocks, "test_efficientnet", text_dim=48),
        CARD("a sibling for tests"),
    ),
]
