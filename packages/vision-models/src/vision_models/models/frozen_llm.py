"""A frozen layer of a language model as the last block of a vision transformer (LM4VisualEncoding).

Paper: Pang, Xie, Man, Wang, Frozen Transformers in Language Models Are Effective Visual Encoder Layers, ICLR 2024,
arXiv 2310.12973. Official code: ziqipang/LM4VisualEncoding, ``image_classification/models/vit_llama.py``, ``llama.py``.

The same as there: every number. Behind the last block a linear layer takes the tokens to the width of the language
model, one of its layers works on them without positions, mask or cache, an RMSNorm whose weights stay 1 and a second
linear layer take them back; nothing goes around. The layer and the norm are frozen, the linear layers are not.

What differs: the language layers stand as one more entry of ``blocks``, so that they are a feature of their own and any
network of timm with ``blocks`` can have them (:func:`append_language`), from any decoder of transformers
(:func:`language_of`). Frozen layers never drop anything out. The controls: without :func:`load_language` the frozen
layer is a random one; ``frozen=False`` trains it; ``language_depth=0`` is the plain transformer.

Numbers are checked in ``tests/models/test_frozen_llm.py`` against a plain network.

Shapes: image (B, 3, Y, X) → logits (B, num_classes); tokens (B, 1 + N, C), maps (B, C, ⌊Y/p⌋, ⌊X/p⌋), p = 16.
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

import copy
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_notrace_module
from torch import Tensor, nn

from attn_core import attention as attend
from attn_core import weights
from attn_core.catalog import Card
from attn_core.weights import KeyMap
from vision_models.layers.token_maps import Linear, init_linear
from vision_models.models.deit import DeiT
from vision_models.registration import pretrained_cfg, timm_entries

__all__ = ["FrozenLLM", "LanguageBlock", "LlamaLayer", "append_language", "language_of", "load_language"]

EPS = 1e-6
MULTIPLE = 256  # of Llama's hidden width


@register_notrace_module
class LlamaAttention(nn.Module):
    """Softmax attention of Llama without positions, mask and biases. (B, N, width) → same."""

    def __init__(self, width: int, num_heads: int, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.wq, self.wk, self.wv, self.wo = (Linear(width, width, bias=False, **dd) for _ in range(4))

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """(B, N, width) → same."""
        q, k, v = (layer(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for layer in (self.wq, self.wk, self.wv))
        return self.wo(attend(q, k, v)[0].transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Llama's gated MLP. (B, N, width) → same."""

    def __init__(self, width: int, hidden: int, **dd: Any) -> None:
        super().__init__()
        self.w1 = Linear(width, hidden, bias=False, **dd)
        self.w2 = Linear(hidden, width, bias=False, **dd)
        self.w3 = Linear(width, hidden, bias=False, **dd)

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """(B, N, width) → same."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class LlamaLayer(nn.Module):
    """A layer of Llama among tokens without order. (B, N, width) → same.

    Args:
        hidden: of the MLP; None: two thirds of four widths, rounded up to a multiple of 256, as in Llama 1.
    """

    def __init__(self, width: int, num_heads: int, hidden: int | None = None, **dd: Any) -> None:
        super().__init__()
        if hidden is None:
            hidden = -(-(8 * width // 3) // MULTIPLE) * MULTIPLE
        self.attention_norm = nn.RMSNorm(width, eps=EPS, **dd)
        self.attention = LlamaAttention(width, num_heads, **dd)
        self.ffn_norm = nn.RMSNorm(width, eps=EPS, **dd)
        self.feed_forward = SwiGLU(width, hidden, **dd)

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """(B, N, width) → same."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class HuggingFaceLayer(nn.Module):
    """A decoder layer of transformers, fed with tokens alone. (B, N, width) → same.

    Args:
        layer: of any decoder whose forward takes the tokens first.
        rotary: the decoder's table of rotary positions, if it has one.
        positions: rotate by them, token by token; otherwise every token stands at 0.
        causal: a token sees itself and those before.
    """

    def __init__(self, layer: nn.Module, rotary: nn.Module | None, *, positions: bool, causal: bool) -> None:
        super().__init__()
        self.layer = layer
        self.rotary = rotary
        self.positions = positions
        self.causal = causal
        self.takes = set(inspect.signature(layer.forward).parameters)
        for module in layer.modules():
            if hasattr(module, "is_causal"):
                vars(module)["is_causal"] = False  # we give the mask ourselves

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """(B, N, width) → same."""
        count = x.shape[1]
        given: dict[str, Any] = {}
        if self.causal:
            later = torch.ones(count, count, dtype=torch.bool, device=x.device).triu(1)
            given["attention_mask"] = x.new_zeros(1, 1, count, count).masked_fill(later, torch.finfo(x.dtype).min)
        if self.rotary is not None and "position_embeddings" in self.takes:
            place = torch.arange(count, device=x.device)[None]
            cos, sin = self.rotary(x, place if self.positions else torch.zeros_like(place))
            given["position_embeddings"] = (cos.to(x.dtype), sin.to(x.dtype))
        out = self.layer(x, **given)
        return out[0] if isinstance(out, tuple) else out


class LanguageBlock(nn.Module):
    """Language layers between two linear layers: one more block of a vision transformer. (B, N, dim) → same.

    Args:
        dim: of the vision transformer.
        layers: language layers, (B, N, width) → same.
        width: of the language layers.
        frozen: they and the norm behind them are not trained, and never drop anything out.
    """

    def __init__(self, dim: int, layers: Sequence[nn.Module], width: int, *, frozen: bool = True, **dd: Any) -> None:
        super().__init__()
        self.frozen = frozen
        self.mapper_in = nn.Linear(dim, width, bias=False, **dd)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.RMSNorm(width, eps=EPS, **dd)
        self.mapper_out = nn.Linear(width, dim, bias=False, **dd)
        for mapper in (self.mapper_in, self.mapper_out):
            trunc_normal_(mapper.weight, std=0.02)
        if frozen:
            self.layers.requires_grad_(False)
            self.norm.requires_grad_(False)
            self.layers.eval()

    def train(self, mode: bool = True) -> "LanguageBlock":
        """As ``nn.Module.train``; frozen layers stay as in evaluation."""
        super().train(mode)
        if self.frozen:
            self.layers.eval()
        return self

    def forward(self, x: Float[Tensor, "B N C"], *_: Any, **given: Any) -> Float[Tensor, "B N C"]:
        """(B, N, dim) → same; what the other blocks are told of grids and positions is not used.

        Raises: ValueError: a mask, which would be left out.
        """
        if given.get("attn_mask") is not None:
            raise ValueError("LanguageBlock: attn_mask must be None: every token sees every other")
        x = self.mapper_in(x)
        for layer in self.layers:
            x = layer(x)
        return self.mapper_out(self.norm(x))


class FrozenLLM(DeiT):
    """DeiT with layers of Llama as its last block.

    Args:
        language_depth: layers of Llama; 0: none, and no linear layers around them.
        width: of Llama; language_heads: its heads.
        hidden: of its MLP; None: as in Llama 1, 11,008 for a width of 4,096.
        frozen: False trains them, too.

        The others: those of :class:`vision_models.DeiT`.

    Raises: ValueError: numbers that do not fit each other.
    """

    def __init__(
        self,
        depth: int = 12,
        embed_dim: int = 192,
        num_heads: int = 3,
        *,
        language_depth: int = 1,
        width: int = 4096,
        language_heads: int = 32,
        hidden: int | None = None,
        frozen: bool = True,
        patch_size: int = 16,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if language_depth < 0:
            raise ValueError(f"FrozenLLM: language_depth must be at least 0, got language_depth={language_depth}")
        if width < 1 or language_heads < 1 or width % language_heads:
            raise ValueError(
                f"FrozenLLM: language_heads must divide width={width}, got language_heads={language_heads}"
            )
        if hidden is not None and hidden < 1:
            raise ValueError(f"FrozenLLM: hidden must be at least 1, got hidden={hidden}")
        super().__init__(
            depth,
            embed_dim,
            num_heads,
            patch_size=patch_size,
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            **dd,
        )
        if language_depth:
            layers = [LlamaLayer(width, language_heads, hidden, **dd) for _ in range(language_depth)]
            block = LanguageBlock(embed_dim, layers, width, frozen=frozen, **dd)
            block.apply(init_linear)
            append_language(self, block)


def append_language(model: Any, block: LanguageBlock) -> Any:
    """Make ``block`` the last of a network's ``blocks``, before its norm and head; returns the network.

    Args:
        model: any of timm's that keeps tokens (B, N, dim) between ``blocks``: ViT, DeiT, BEiT, EVA, …, or of ours.

    Raises: ValueError: a network without ``blocks``; another width.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or len(blocks) == 0:
        raise ValueError(f"append_language: model must keep its tokens between blocks, got a {type(model).__name__}")
    width, dim = getattr(model, "embed_dim", model.num_features), block.mapper_in.in_features
    if dim != width:
        raise ValueError(f"append_language: block must have dim={width} of the model, got dim={dim}")
    features = getattr(model, "feature_info", None)
    if isinstance(features, list) and features:
        features.append({**features[-1], "module": f"blocks.{len(blocks)}"})
    blocks.append(block)
    return model


def language_of(
    language: Any,
    dim: int,
    *,
    depth: int = 1,
    positions: bool = False,
    causal: bool = False,
    frozen: bool = True,
) -> LanguageBlock:
    """The last layers of a decoder of transformers between linear layers, for :func:`append_language`. ::

        vit = timm.create_model("vit_small_patch16_224", pretrained=True)
        append_language(vit, language_of(AutoModel.from_pretrained("facebook/opt-125m"), vit.embed_dim))

    Args:
        language: a decoder, or a model with a head on one: OPT, Llama, Qwen, GPT-2, …; it is not changed.
        dim: of the vision transformer.
        depth: how many of its last layers.
        positions: rotate queries and keys by the tokens' places, row by row, where the decoder does so.
        causal: a token sees itself and those before. frozen: False trains the layers.

    Raises: ValueError: no decoder layers in ``language``, or fewer.
    """
    decoder = language
    while (inner := _decoder(decoder)) is not decoder:
        decoder = inner
    found = next((m for name in ("layers", "h") if isinstance(m := getattr(decoder, name, None), nn.ModuleList)), None)
    if found is None:
        raise ValueError(f"language_of: language must have decoder layers, got a {type(language).__name__}")
    if not 1 <= depth <= len(found):
        raise ValueError(f"language_of: depth must be from 1 to {len(found)}, the decoder's layers, got depth={depth}")
    width = language.config.hidden_size
    rotary = copy.deepcopy(getattr(decoder, "rotary_emb", None))
    taken = [copy.deepcopy(layer) for layer in list(found)[-depth:]]
    layers = [HuggingFaceLayer(layer, rotary, positions=positions, causal=causal) for layer in taken]
    like = next(taken[0].parameters())
    return LanguageBlock(dim, layers, width, frozen=frozen, device=like.device, dtype=like.dtype)


def _decoder(model: Any) -> Any:
    """The next module on the way to a decoder's layers: ``model.decoder`` of OPT, ``transformer`` of GPT-2."""
    if hasattr(model, "layers") or hasattr(model, "h"):
        return model
    return next((getattr(model, n) for n in ("model", "decoder", "transformer") if hasattr(model, n)), model)


# transformers' name → Meta's. Without positions the order of rows, which transformers changed to rotate them, cancels.
HUGGING_FACE = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def load_language(model: FrozenLLM, source: Mapping[str, Any] | str | Path) -> FrozenLLM:
    """Copy the last layers that a checkpoint of Llama holds into the language layers of ``model``.

    The norm behind them keeps its ones, as in the official code.

    Args:
        source: a file, ``hf://owner/repo/file``, or what such a file holds, by Meta's names
            (``layers.31.attention.wq``) or transformers' (``model.layers.31.self_attn.q_proj``); of weights in several
            files, the last.

    Raises: ValueError: the model has no language layers; too few in the checkpoint, or of another size.
    """
    block = model.blocks[-1]
    if not isinstance(block, LanguageBlock):
        raise ValueError("load_language: the model has no language layers; build it with language_depth≥1")
    checkpoint = weights.read(source, caller="load_language")
    found: dict[int, dict[str, Tensor]] = {}
    for name, value in checkpoint.tensors.items():
        at = re.search(r"(?:^|\.)layers\.(\d+)\.(.+)\.weight$", name)
        if at and (own := HUGGING_FACE.get(at[2], at[2])) in HUGGING_FACE.values():
            found.setdefault(int(at[1]), {})[f"{own}.weight"] = value
    depth = len(block.layers)
    if len(found) < depth:
        raise ValueError(
            f"load_language: {checkpoint.source} holds {len(found)} layers of Llama, the model needs {depth}"
        )
    last = sorted(found)[-depth:]
    tensors = {f"{i}.{name}": value for i, layer in enumerate(last) for name, value in found[layer].items()}
    weights.fill(block.layers, replace(checkpoint, tensors=tensors), caller="load_language")
    return model


def with_language(language: str | None = None, **options: Any) -> FrozenLLM:
    """A network for recipes: with the language layers of a file, or random ones.

    Raises: ValueError: options or weights that do not fit.
    """
    net = FrozenLLM(**options)
    return net if language is None else load_language(net, language)


KEY_MAP: KeyMap = {
    "llama": (
        (r"^blocks\.\d+\.mapper_in\.", "llama_dim_mapper1."),
        (r"^blocks\.\d+\.mapper_out\.", "llama_dim_mapper2."),
        (r"^blocks\.\d+\.(layers|norm)\.", r"llama.\1."),
    )
}
FrozenLLM.key_map = KEY_MAP

VARIANTS: dict[str, dict[str, Any]] = {
    "vit_llama_tiny": {},
    "vit_llama_small": {"embed_dim": 384, "num_heads": 6},
    "vit_llama_base": {"embed_dim": 768, "num_heads": 12},
    "test_vit_llama": {
        "depth": 3,
        "embed_dim": 48,
        "num_heads": 4,
        "img_size": 96,
        "width": 64,
        "language_heads": 4,
        "hidden": 96,
    },
}
_CFG: dict[str, Any] = {"first_conv": "patch_embed.proj", "classifier": "head", "pool_size": None, "crop_pct": 0.9}
default_cfgs = generate_default_cfgs(
    {
        name: pretrained_cfg(
            options.get("img_size", 224),
            **_CFG,
            license="mit",
            paper_ids="arXiv:2310.12973",
            origin_url="https://github.com/ziqipang/LM4VisualEncoding",
        )
        for name, options in VARIANTS.items()
    }
)

CARD = Card(
    family="Frozen language layers",
    paper="2310.12973",
    code="https://github.com/ziqipang/LM4VisualEncoding",
    license="MIT",
    test="models/test_frozen_llm.py",
)
CARDS = {
    "vit_llama_tiny": CARD("DeiT-T and a layer of Llama 7B"),
    "vit_llama_small": CARD("DeiT-S and a layer of Llama 7B", "top-1 80.7 %"),
    "vit_llama_base": CARD("DeiT-B and a layer of Llama 7B"),
    "test_vit_llama": CARD("Small enough for tests (< 0.5 M parameters)"),
}
ENTRIES = timm_entries(
    FrozenLLM, VARIANTS, CARDS, default_cfgs, maps=lambda _: {"feature_cls": "getter", "out_indices": 3}
)
