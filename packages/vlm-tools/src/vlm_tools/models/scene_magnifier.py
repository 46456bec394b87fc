"""Scene magnifier: rows of a decoder look closer, at dense tokens of the scene's tokens that the layer before attended.

Paper: LSceneLLM: Enhancing Large 3D Scene Understanding Using Adaptive Visual Preferences, Zhi et al., CVPR 2025, arXiv
2412.01292. Official code: https://github.com/Hoyyyaard/LSceneLLM, ``models/modeling_llama.py`` (MIT by its README).

The same: from layer ``start`` on, the attention of a row behind the scene to the scene's S tokens, summed over heads
and stretched to [0, 1] over the scene, chooses tokens above 96/255. The next layer adds the P dense tokens of each
chosen one as keys and values, through projections of their own and with the rotary position of their scene token; the
output is mixed with the ordinary one by ``min(1, warm_up · progress)`` while training.
What differs: a plug-in for any decoder of transformers with rotary positions (grouped heads, a norm of keys by head,
caches, beams, left padding), in place of a changed Llama; no N×N map nor its mask: the scene's columns alone are
computed again, from the log-sum-exp; a row with one score everywhere chooses nothing without dividing by zero; every
row of a batch has its own scene; layer ``start``, whose projections the official code holds and never uses, has none;
new projections start as copies of the decoder's own.

Numbers are checked in ``tests/models/test_scene_magnifier.py`` (maps written out, float64).

Shapes: dense (B, S, P, C), scene (B, T) with S tokens in each row; prompts, caches and logits are the decoder's.
"""

import dataclasses
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from attn_core import attention, merge_attention, weights
from vlm_tools.intervention.visibility import visibility

IMPLEMENTATION = "vlm_tools_magnifier"
THRESHOLD = 96 / 255  # the official code compares 255 times the score with 96
_RUNS: "weakref.WeakKeyDictionary[nn.Module, _Run]" = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


class SceneMagnifier(nn.Module):
    """Projections of dense tokens for the layers behind ``start``, and how they are chosen.

    Args:
        model: the decoder, or a model that has one, whose sizes are taken and whose projections are copied.
        start: first layer whose attention chooses; 8 in the official code, whose decoder has 32.
        threshold: of the stretched score in [0, 1).
        warm_up: while training, dense tokens count ``min(1, warm_up · progress)``; None: wholly from the beginning.

    Attributes:
        progress: share of the training that is over, set by the training loop; 1 by default.

    Raises:
        ValueError: a model without a decoder of such layers, a start without a layer behind it, a threshold
            outside [0, 1), a warm-up that is not positive.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        start: int = 8,
        threshold: float = THRESHOLD,
        warm_up: float | None = 20.0,
    ) -> None:
        super().__init__()
        layers = _attentions(model)
        if not 0 <= start < len(layers) - 1:
            raise ValueError(
                f"SceneMagnifier: start must lie in 0 … {len(layers) - 2}, so that a layer is behind it, "
                f"got start={start}"
            )
        if not 0 <= threshold < 1:
            raise ValueError(f"SceneMagnifier: threshold must lie in [0, 1), got threshold={threshold}")
        if warm_up is not None and not warm_up > 0:
            raise ValueError(f"SceneMagnifier: warm_up must be positive or None, got warm_up={warm_up}")
        self.start, self.threshold, self.warm_up, self.progress = start, threshold, warm_up, 1.0
        self.width: int = layers[0].k_proj.in_features
        self.keys = nn.ModuleDict({str(n): _copy(layers[n].k_proj) for n in range(start + 1, len(layers))})
        self.values = nn.ModuleDict({str(n): _copy(layers[n].v_proj) for n in range(start + 1, len(layers))})

    @property
    def share(self) -> float:
        """How much of the magnified output is mixed in, in [0, 1]."""
        if not self.training or self.warm_up is None:
            return 1.0
        return min(1.0, self.warm_up * self.progress)


def chosen_tokens(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hk S D"],
    lse: Float[Tensor, "B H N"],
    *,
    scale: float,
    visible: Bool[Tensor, "B S"] | None = None,
    threshold: float = THRESHOLD,
) -> Bool[Tensor, "B N S"]:
    """Scene tokens that rows look at most: Σ over heads of exp(scale·q·k − lse), stretched to [0, 1], above a bound.

    H·N·S scores are held, whatever the number of keys.

    Args:
        k: the scene's keys.
        lse: of the rows over all keys; −inf where a row sees none.
        visible: scene tokens that rows see.

    Raises:
        ValueError: head counts that do not divide, or log-sum-exps of another shape.
    """
    batch, heads, rows, width = q.shape
    groups = k.shape[1]
    if heads % groups or lse.shape != q.shape[:3]:
        raise ValueError(
            f"chosen_tokens: lse must be (B, H, N) of q and its heads a multiple of k's, got q {tuple(q.shape)}, "
            f"k {tuple(k.shape)}, lse {tuple(lse.shape)}"
        )
    with torch.no_grad():
        if k.shape[2] == 0:
            return q.new_zeros(batch, rows, 0, dtype=torch.bool)
        grouped = q.reshape(batch, groups, heads // groups * rows, width)
        scores = torch.matmul(grouped, k.transpose(-2, -1)).view(batch, heads, rows, k.shape[2]).to(lse.dtype)
        # A row that sees nothing has an lse of −inf, which would turn into +inf.
        mass = scores.mul_(scale).sub_(lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]).exp_()
        if visible is not None:
            mass = mass * visible[:, None, None]
        total = mass.sum(1)
        least, most = total.aminmax(dim=-1, keepdim=True)
        # Not divided by the range, which is 0 in a row of equal scores.
        return (total - least) > threshold * (most - least)


class _Run:
    """Dense tokens at work in a decoder, from the prompt to the last token."""

    def __init__(
        self, magnifier: SceneMagnifier, dense: Tensor, scene: Bool[Tensor, "B T"], asks: Bool[Tensor, "B T"] | None
    ) -> None:
        self.magnifier, self.dense, self.given_scene, self.given_asks = magnifier, dense, scene, asks
        self.scene, self.asks = scene, scene
        self.past = 0
        self.turns: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.tokens: dict[int, tuple[Tensor, Tensor]] = {}
        self.chosen: Tensor | None = None

    def begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the decoder: where its new tokens stand."""
        new = kwargs.get("inputs_embeds")
        new = kwargs.get("input_ids", args[0] if args else None) if new is None else new
        cache = kwargs.get("past_key_values")
        self.past, self.chosen = 0 if cache is None else int(cache.get_seq_length()), None
        if self.past:
            return
        batch, given = int(new.shape[0]), len(self.given_scene)  # pyright: ignore[reportOptionalMemberAccess]
        if batch != given and (given == 0 or batch % given):
            raise ValueError(
                f"magnified: scene has {given} rows, the prompt {batch}; give one for each prompt (beams and "
                "returned sequences are repeated here)"
            )
        self.turns.clear()
        self.tokens.clear()
        repeated = batch // given if given else 1
        self.scene = self.given_scene.repeat_interleave(repeated, 0)
        if self.given_asks is None:
            place = torch.arange(self.scene.shape[1], device=self.scene.device)
            last = torch.where(self.scene, place, -1).amax(1, keepdim=True)
            self.asks = (place > last) & (last >= 0)
        else:
            self.asks = self.given_asks.repeat_interleave(repeated, 0)

    def turn(self, layer: int) -> Any:
        """Forward pre-hook of an attention: the rotations of the prompt's positions."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            turns = kwargs.get("position_embeddings", args[1] if len(args) > 1 else None)
            if turns is None or turns[0].dim() != 3:
                raise ValueError(
                    "magnified: the decoder's layers get no rotary positions of (B, N, D), with which dense tokens are "
                    "placed; Llama-like decoders do"
                )
            if self.past < self.scene.shape[1]:
                self.turns.setdefault(layer, []).append(turns)

        return hook

    def of_call(self, queries: int) -> tuple[Bool[Tensor, "B N"], int]:
        """Rows that ask in this call, and the first column with any."""
        asks = F.pad(self.asks, (0, max(self.past + queries - self.asks.shape[1], 0)), value=True)
        asks = asks[:, self.past : self.past + queries]
        columns = asks.any(0).nonzero()
        return asks, int(columns[0]) if len(columns) else queries

    def places(self) -> Tensor:
        """(B, S) positions of scene tokens."""
        return self.scene.nonzero()[:, 1].view(len(self.scene), -1)

    def dense_tokens(self, layer: int, module: Any) -> tuple[Float[Tensor, "B Hk K D"], Float[Tensor, "B Hk K D"]]:
        """Keys and values of all dense tokens, made once for a prompt."""
        if layer in self.tokens:
            return self.tokens[layer]
        dense = self.dense.repeat_interleave(len(self.scene) // len(self.dense), 0)
        key, value = (
            part[str(layer)](dense.flatten(1, 2)).unflatten(-1, (-1, module.head_dim))
            for part in (self.magnifier.keys, self.magnifier.values)
        )
        if (norm := getattr(module, "k_norm", None)) is not None:
            key = norm(key)
        places = self.places()
        cos, sin = (torch.cat([turn[n].expand(len(places), -1, -1) for turn in self.turns[layer]], 1) for n in (0, 1))
        # Of a row whose scene has not wholly come yet, which does not ask yet, other positions are taken.
        index = places.clamp_max(cos.shape[1] - 1).repeat_interleave(dense.shape[2], 1)[..., None]
        index = index.expand(-1, -1, cos.shape[-1])
        key = rotated(key.transpose(1, 2), cos.gather(1, index)[:, None], sin.gather(1, index)[:, None])
        tokens = key, value.transpose(1, 2)
        if cos.shape[1] >= self.scene.shape[1]:
            self.tokens[layer] = tokens
        return tokens

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Attention of a layer from ``start`` on, (B, N, H, D)."""
        layer, queries, keys = int(module.layer_idx), query.shape[2], key.shape[2]
        if keys < min(self.past + queries, self.scene.shape[1]):
            raise ValueError(f"magnified: layer {layer} keeps {keys} keys, so that the scene may be lost; sliding "
                             "windows and their caches are not supported")  # fmt: skip
        seen = visibility(mask, queries=queries, keys=keys, dtype=query.dtype)
        key, value = key[:, :, : seen.keys], value[:, :, : seen.keys]
        out, lse = attention(query, key, value, scale=scale, **seen.rows())
        asks, first = self.of_call(queries)
        if first == queries or self.scene.shape[0] == 0:
            return out.transpose(1, 2)
        asking = asks[:, first:]
        own_q, own_lse = query[:, :, first:], lse[:, :, first:]
        places = self.places().clamp_max(seen.keys - 1)
        index = places[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[-1])
        visible = None if seen.key_mask is None else seen.key_mask.expand(len(places), -1).gather(1, places)
        if seen.bias is not None:  # the scene is before its rows: what the last one sees of it, all see
            visible = seen.bias[:, 0, -1].expand(len(places), -1).gather(1, places) == 0
        chosen = chosen_tokens(own_q, key.gather(2, index), own_lse, scale=scale, visible=visible,
                               threshold=self.magnifier.threshold)  # fmt: skip
        earlier, self.chosen = self.chosen, chosen & asking[..., None]
        if earlier is None or layer <= self.magnifier.start:
            return out.transpose(1, 2)
        dense_key, dense_value = self.dense_tokens(layer, module)
        hidden = ~earlier.repeat_interleave(self.dense.shape[2], -1)[:, None]
        bias = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(hidden, -torch.inf)
        part, part_lse = attention(
            own_q, dense_key.to(own_q.dtype), dense_value.to(own_q.dtype), scale=scale, bias=bias
        )
        closer, _ = merge_attention([out[:, :, first:].contiguous(), part], [own_lse.contiguous(), part_lse])
        plain = out[:, :, first:]
        share = self.magnifier.share
        mixed = closer if share == 1 else torch.lerp(plain, closer, share)
        mixed = torch.where(asking[:, None, :, None], mixed, plain)
        return torch.cat([out[:, :, :first], mixed], 2).transpose(1, 2)


def rotated(
    x: Float[Tensor, "B H N D"], cos: Float[Tensor, "B 1 N R"], sin: Float[Tensor, "B 1 N R"]
) -> Float[Tensor, "B H N D"]:
    """Rotary positions on the first R columns, halves paired as in Llama."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    one, other = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-other, one], -1) * sin, rest], -1).to(x.dtype)


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    run = _RUNS.get(module)
    if run is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )[0], None
    if dropout or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError("magnified: dropout of attention, soft-capped scores and learned sinks are not supported "
                         f"(dropout={dropout}); set the configuration's attention_dropout to 0")  # fmt: skip
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return run.attend(module, query, key, value, attention_mask, scale).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, _attention_function)  # pyright: ignore[reportArgumentType]
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


@contextmanager
def magnified(
    model: PreTrainedModel,
    magnifier: SceneMagnifier,
    dense: Float[Tensor, "B S P C"],
    scene: Bool[Tensor, "B T"],
    *,
    asks: Bool[Tensor, "B T"] | None = None,
) -> Iterator[_Run]:
    """Run ``model`` with its scene's dense tokens at hand inside the block; afterwards it is as before.

    Forward passes with gradients, ``generate`` with padding on the left, beams and any cache that keeps the prompt.

    Args:
        dense: P dense tokens of each of the S scene tokens, in the decoder's width.
        scene: True at the scene's tokens of the prompt, S in each row.
        asks: True at the prompt's rows that look closer; those behind the scene by default. New tokens always do.

    Raises:
        ValueError: shapes that do not fit, a magnifier of another decoder, a model under another block; later, inside
            the block: a prompt of other rows, layers without rotary positions, sliding windows, dropout.
    """
    layers = _attentions(model)
    _check(magnifier, layers, dense, scene, asks)
    decoder: Any = model.get_decoder()
    before = decoder.config._attn_implementation
    if before == IMPLEMENTATION:
        raise ValueError("magnified: the model is in such a block already; leave it first")
    run = _Run(magnifier, dense, scene, asks)
    with ExitStack() as undone:
        undone.callback(decoder.set_attn_implementation, before)
        for number, module in enumerate(layers):
            if number >= magnifier.start:
                with _LOCK:
                    _RUNS[module] = run
                undone.callback(_RUNS.pop, module, None)
            if number > magnifier.start:
                hook = module.register_forward_pre_hook(run.turn(number), with_kwargs=True)
                undone.callback(hook.remove)
        undone.callback(decoder.register_forward_pre_hook(run.begin, with_kwargs=True).remove)
        decoder.set_attn_implementation(IMPLEMENTATION)
        yield run


def _check(magnifier: SceneMagnifier, layers: Sequence[Any], dense: Tensor, scene: Tensor, asks: Tensor | None) -> None:
    if dense.dim() != 4 or dense.shape[-1] != magnifier.width:
        raise ValueError(f"magnified: dense must be (B, S, P, {magnifier.width}), got {tuple(dense.shape)}")
    if scene.dim() != 2 or scene.dtype != torch.bool:
        raise ValueError(f"magnified: scene must be (B, T) of bool, got {tuple(scene.shape)} of {scene.dtype}")
    counts = scene.sum(1).tolist()
    if len(scene) != len(dense) or any(count != dense.shape[1] for count in counts):
        raise ValueError(
            f"magnified: scene must mark the S tokens of dense in each of its rows, got dense {tuple(dense.shape)} and "
            f"{counts} tokens"
        )
    if asks is not None and (asks.shape != scene.shape or asks.dtype != torch.bool):
        raise ValueError(
            f"magnified: asks must be bool and of the shape of scene, {tuple(scene.shape)}, got {tuple(asks.shape)} of "
            f"{asks.dtype}"
        )
    if asks is not None and bool((asks & scene.flip(1).cumsum(1).flip(1).bool()).any()):
        raise ValueError(
            "magnified: asks marks rows before the scene's last token, which cannot look back at all of it"
        )
    last = str(len(layers) - 1)
    if (
        last not in magnifier.keys
        or str(len(layers)) in magnifier.keys
        or layers[0].k_proj.in_features != magnifier.width
    ):
        raise ValueError(
            f"magnified: the magnifier was made for a decoder of width {magnifier.width} and layers up to "
            f"{max(map(int, magnifier.keys))}, the model's has {layers[0].k_proj.in_features} and {len(layers)} layers"
        )


def _attentions(model: PreTrainedModel) -> list[Any]:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    found = [getattr(layer, "self_attn", None) for layer in getattr(decoder, "layers", ())]
    if not found or any(not hasattr(one, "k_proj") or not hasattr(one, "v_proj") for one in found):
        raise ValueError(
            f"SceneMagnifier: {type(model).__name__} has no decoder whose layers have self_attn.k_proj and v_proj"
        )
    return found


def _copy(linear: nn.Linear) -> nn.Linear:
    new = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None,
                    device=linear.weight.device, dtype=linear.weight.dtype)  # fmt: skip
    new.load_state_dict(linear.state_dict())
    return new


def load_official(
    magnifier: SceneMagnifier, source: Mapping[str, Any] | str | Path, *, ignore: Sequence[str] = ()
) -> SceneMagnifier:
    """Copy the projections of dense tokens from a checkpoint of the official code, or one with our names.

    The rest of its Llama is left to transformers.

    Raises:
        ValueError: a projection is missing or of another shape.
    """
    checkpoint = weights.read(source, prefixes=("module.", "llm."))
    names = {ours: ours for ours in magnifier.state_dict()}
    official = {}
    for ours in names:
        part, layer, kind = ours.split(".")
        official[f"model.layers.{layer}.self_attn.{KEY_MAP[part]}.{kind}"] = ours
    if official.keys() & checkpoint.tensors.keys():
        names = official
    own = {name: value for name, value in checkpoint.tensors.items() if name in names}
    return weights.fill(magnifier, dataclasses.replace(checkpoint, tensors=own), names, ignore=ignore)


KEY_MAP = {"keys": "k_proj_hd", "values": "v_proj_hd"}


def crop_tokens(
    features: Float[Tensor, "B C Y X"], grid: tuple[int, int], per_side: int = 2
) -> Float[Tensor, "B S P C"]:
    """Dense tokens of a picture: P = per_side² averages of a high-resolution map inside each of the S cells of a grid.

    Args:
        grid: rows and columns of the coarse tokens, which are its cells in raster order.

    Raises:
        ValueError: sizes below 1, or a map with fewer pixels than tokens along a side.
    """
    rows, columns = grid
    if (
        min(rows, columns, per_side) < 1
        or features.shape[2] < rows * per_side
        or features.shape[3] < columns * per_side
    ):
        raise ValueError(
            f"crop_tokens: grid and per_side must be at least 1 and their product at most the map's sides, got "
            f"grid={grid}, per_side={per_side} for a map of {tuple(features.shape[2:])}"
        )
    pooled = F.adaptive_avg_pool2d(features, (rows * per_side, columns * per_side))
    cells = pooled.unflatten(3, (columns, per_side)).unflatten(2, (rows, per_side))
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(1, 2).flatten(2, 3)


def read_scene(path: str | Path) -> tuple[Float[Tensor, "S C"], Float[Tensor, "S P C"]]:
    """Tokens of a 3-D scene: a file, ``.npz`` or ``.safetensors``, with ``coarse`` (S, C) and ``dense`` (S, P, C).

    Raises:
        ValueError: another kind of file or a broken one; arrays that are missing, do not fit or are not finite.
    """
    path = Path(path)
    try:
        found = _tokens_of(path)
    except (OSError, ValueError, KeyError, EOFError) as error:
        reason = str(error).split("\n", 1)[0][:160]
        raise ValueError(f"read_scene: {path} cannot be read ({reason}); it must be a .npz or .safetensors file with "
                         "'coarse' (S, C) and 'dense' (S, P, C)") from None  # fmt: skip
    coarse, dense = found
    if coarse.dim() != 2 or dense.dim() != 3 or len(coarse) != len(dense) or len(coarse) == 0:
        raise ValueError(
            f"read_scene: {path} holds coarse {tuple(coarse.shape)} and dense {tuple(dense.shape)}, not (S, C) and "
            "(S, P, C)"
        )
    for name, value in (("coarse", coarse), ("dense", dense)):
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"read_scene: {name} of {path} holds values that are not finite")
    return coarse, dense


def _tokens_of(path: Path) -> tuple[Tensor, Tensor]:
    if path.suffix.lower() == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(str(error)) from None
        return tensors["coarse"].float(), tensors["dense"].float()
    if path.suffix.lower() != ".npz":
        raise ValueError(f"its ending is {path.suffix!r}")
    import zipfile

    import numpy as np

    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return tuple(torch.from_numpy(np.asarray(arrays[name], dtype=np.float32)) for name in ("coarse", "dense"))  # type: ignore[return-value]
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from None
