"""ACT: tokens that draw much attention without need give part of it to all others.

Paper: Yu et al., Unveiling and Harnessing Hidden Attention Sinks, ICML 2024, arXiv 2406.15765.
Official code: GATECH-EIC/ACT, ``models/llama_modelling_aug.py`` (``atten_process_eval``), head lists in
``models/augment_index.py`` (not copied; `search_heads` finds them for any model).

The same: a key is a sink if the mean attention of the rows that see it exceeds a threshold, the first sink is spared,
sinks keep ``beta`` of their attention, the rest goes to all other keys in proportion. Different: batches, left padding,
grouped heads; no N×N map: two passes of `attn_core.attention` (the column sums are the log-sum-exp of attention from
keys to queries) and a gather of the sinks; columns with fewer than ``min_rows`` rows are no sinks (official: 1), since
one large entry makes a mean there; decoded rows use the prompt's sinks (the official code corrupts them).
Checked in ``tests/methods/test_act.py``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attn_core import attention
from attn_core.catalog import Card, Entry
from vlm_tools.intervention.method import (
    AttentionCall,
    Method,
    check_number,
    check_share,
    check_whole,
    checked_numbers,
    note,
)
from vlm_tools.intervention.visibility import Visibility


class ACT(Method):
    """Attention calibration.

    Args:
        threshold: mean attention that makes a key a sink. The paper's 5/N is ``relative=5``.
        relative: threshold times the number of tokens of the prompt, padding aside; used instead of ``threshold`` if
            given.
        beta: what sinks keep.
        heads: layer → heads to calibrate; None calibrates all heads of the layers.
        min_rows: rows that must see a key.
        layers: layers to change; 2 … second to last by default.

    Raises:
        ValueError: a share outside [0, 1], a head that does not exist.
    """

    name = "act"
    needs_image = False

    def __init__(
        self,
        *,
        threshold: float = 0.1,
        relative: float | None = None,
        beta: float = 0.4,
        heads: Mapping[int, Sequence[int]] | None = None,
        min_rows: int = 8,
        layers: Sequence[int] | None = None,
    ) -> None:
        self.heads = None if heads is None else _heads_of_layers(heads)
        super().__init__(layers if layers is not None or self.heads is None else sorted(self.heads))
        check_share("ACT", "threshold", threshold)
        check_share("ACT", "beta", beta)
        if relative is not None:
            check_number("ACT", "relative", relative, "be positive", lambda value: value > 0)
        check_whole("ACT", "min_rows", min_rows, 1)
        self.threshold = threshold
        self.relative = relative
        self.beta = beta
        self.min_rows = min_rows

    def default_layers(self, count: int) -> Sequence[int]:
        """All but the first two and the last."""
        return range(min(2, count), max(2, count - 1))

    def attend(self, call: AttentionCall) -> Float[Tensor, "B N H D"]:
        """Calibrate the chosen heads."""
        total = call.q.shape[1]
        heads = range(total) if self.heads is None else self.heads.get(call.layer, ())
        wrong = [head for head in heads if not 0 <= head < total]
        if wrong:
            raise ValueError(f"ACT: layer {call.layer} has heads 0 … {total - 1}, got heads={list(heads)}")
        if not len(heads):
            return call.plain()
        out = call.plain() if len(heads) < total else None
        k, v = call.visible_keys
        share = total // k.shape[1]
        index = torch.tensor(list(heads), device=call.q.device)
        q = call.q.index_select(1, index)
        k, v = (x.index_select(1, index // share) for x in (k, v))
        plain, lse = attention(q, k, v, scale=call.scale, **call.visible.rows())
        if call.prefill:
            call.state["sinks"] = sinks_of(
                q,
                k,
                lse,
                call.visible,
                scale=call.scale,
                threshold=self.threshold if self.relative is None else self.relative / _tokens(call),
                min_rows=self.min_rows,
            )
        sinks = call.state["sinks"]
        sinks = torch.nn.functional.pad(sinks, (0, max(0, k.shape[2] - sinks.shape[2])))[..., -k.shape[2] :]
        changed, mass = calibrate(q, k, v, plain, lse, sinks, call.visible, scale=call.scale, beta=self.beta)
        note(call, mass > 0, (1 - self.beta) * mass)
        changed = changed.transpose(1, 2)
        if out is None:
            return changed
        return out.index_copy(2, index, changed.to(out.dtype))


def _heads_of_layers(heads: Any) -> dict[int, list[int]]:
    """Layer → heads; layers may be text, as JSON has them."""
    if not isinstance(heads, Mapping) or any(not str(layer).isdecimal() for layer in heads):
        raise ValueError(f"ACT: heads must map numbers of layers to lists of heads, got heads={heads!r}")
    return {int(layer): list(checked_numbers("ACT", "heads", chosen)) for layer, chosen in heads.items()}


def sinks_of(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H M D"],
    lse: Float[Tensor, "B H N"],
    visible: Visibility,
    *,
    scale: float,
    threshold: float | Float[Tensor, "B 1 1"],
    min_rows: int = 1,
) -> Bool[Tensor, "B H M"]:
    """Keys whose mean attention over the rows that see them exceeds ``threshold``, without the first such key.

    The column sum Σ_i exp(s_ij − lse_i) is the exponentiated log-sum-exp of attention from keys to queries with the
    bias −lse, whose causality is the original one with both sequences reversed; the bias rides along as a further
    width.

    Args:
        lse: log-sum-exp of the scores of each query.
    """
    dead = lse.isneginf()
    factor = torch.cat([k * scale, torch.ones_like(k[..., :1])], dim=-1)
    reader = torch.cat([q, -lse.masked_fill(dead, 0.0).to(q.dtype).unsqueeze(-1)], dim=-1)
    alive = ~dead.all(1) & _is_token(visible, q.shape[2], k.shape[2])  # queries in the padding give nothing
    options: dict[str, object] = {}
    if visible.bias is not None:
        options["bias"] = visible.bias.transpose(2, 3).flip(2, 3)
    if visible.causal is not None:
        options["causal"] = "upper_left" if q.shape[2] == k.shape[2] else None
        if q.shape[2] != k.shape[2]:
            rows = visible.dense(1 if visible.key_mask is None else q.shape[0], device=q.device)
            bias = torch.zeros(rows.shape, dtype=q.dtype, device=q.device).masked_fill(~rows, -torch.inf)
            options["bias"] = bias.transpose(1, 2).flip(1, 2)[:, None]
    _, column = attention(
        factor.flip(2),
        reader.flip(2),
        q[..., :1],
        scale=1.0,
        key_mask=alive.flip(1),
        **options,  # pyright: ignore[reportArgumentType]
    )
    support = _support(visible, alive, k.shape[2])
    mean = column.flip(2).exp() / support.clamp_min(1)[:, None]
    found = (mean > threshold) & (support >= min_rows)[:, None]
    if visible.key_mask is not None:
        found = found & visible.key_mask[:, None]
    return found & (found.cumsum(-1) > 1)


def _tokens(call: AttentionCall) -> Float[Tensor, "B 1 1"]:
    """Keys that are tokens, not padding, of each row."""
    token = call.visible.dense(call.q.shape[0], call.q.shape[2] - 1, device=call.q.device)[:, 0]
    return token.sum(-1).clamp_min(1).float()[:, None, None]


def _is_token(visible: Visibility, queries: int, keys: int) -> Bool[Tensor, "B N"] | bool:
    """Queries whose own key some row sees: a bidirectional prefix lets padding rows see others, never be seen."""
    if visible.bias is not None:
        seen = (visible.bias[:, 0] == 0).any(1)
    elif visible.key_mask is not None:
        seen = visible.key_mask
    else:
        return True
    return seen[:, keys - queries :]


def _support(visible: Visibility, alive: Bool[Tensor, "B N"], keys: int) -> Float[Tensor, "B M"]:
    """How many rows see each key."""
    if visible.bias is not None:
        return ((visible.bias[:, 0] == 0) & alive[..., None]).sum(1).float()
    if visible.causal is None:
        return alive.sum(1, keepdim=True).float().expand(-1, keys)
    later = alive.flip(1).cumsum(1).flip(1)  # alive rows from row i on
    first = torch.arange(keys, device=alive.device) - (keys - alive.shape[1])
    return later[:, first.clamp_min(0)].float()


def calibrate(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H M D"],
    v: Float[Tensor, "B H M Dv"],
    out: Float[Tensor, "B H N Dv"],
    lse: Float[Tensor, "B H N"],
    sinks: Bool[Tensor, "B H M"],
    visible: Visibility,
    *,
    scale: float,
    beta: float,
) -> tuple[Float[Tensor, "B H N Dv"], Float[Tensor, "B H N"]]:
    """κ·out + (β − κ)·out_S with κ = 1 + (1 − β)·A_S / (1 − A_S), and A_S, the attention on sinks.

    Rows that see nothing but sinks are left alone.

    Args:
        out, lse: ordinary attention and its log-sum-exp.
    """
    most = int(sinks.sum(-1).max()) if sinks.numel() else 0
    if most == 0:
        return out, torch.zeros_like(lse)
    real, place = sinks.float().topk(most, dim=-1)  # (B, H, S)
    own_k, own_v = (torch.take_along_dim(x, place[..., None], dim=2) for x in (k, v))
    score = torch.matmul(q, own_k.transpose(-2, -1)).to(lse.dtype) * scale
    row = torch.arange(q.shape[2], device=q.device)[:, None]
    hidden = real[:, :, None] == 0
    if visible.causal is not None:
        hidden = hidden | (place[:, :, None] > row + (k.shape[2] - q.shape[2]))
    if visible.key_mask is not None:
        hidden = hidden | ~torch.take_along_dim(visible.key_mask[:, None], place, dim=2)[:, :, None]
    if visible.bias is not None:
        score = score + torch.take_along_dim(visible.bias, place[:, :, None], dim=3)
    share = (score - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp().masked_fill(hidden, 0.0)
    mass = share.sum(-1)
    mass = torch.where(mass < 1 - 1e-6, mass, 0.0)
    kappa = 1 + (1 - beta) * mass / (1 - mass)
    from_sinks = torch.matmul(share.to(own_v.dtype), own_v)
    changed = kappa[..., None] * out + (beta - kappa)[..., None] * from_sinks
    return torch.where((mass > 0)[..., None], changed, out).to(out.dtype), mass


def search_heads(
    score: Callable[[ACT], float],
    layers: Sequence[int],
    heads: int,
    *,
    threshold: float = 0.1,
    beta: float = 0.4,
) -> dict[int, list[int]]:
    """Heads whose calibration alone raises a score above that of the uncalibrated model: the paper's search.

    Args:
        score: value of a method on held-out samples, higher is better; called once per head and once with no head.
        layers: layers to search.
        heads: heads of a layer.
    """
    baseline = score(ACT(threshold=threshold, beta=beta, heads={}))
    found: dict[int, list[int]] = {}
    for layer in layers:
        kept = [
            head
            for head in range(heads)
            if score(ACT(threshold=threshold, beta=beta, heads={layer: [head]})) > baseline
        ]
        if kept:
            found[layer] = kept
    return found


CARD = Card(
    family="ACT", paper="2406.15765", code="https://github.com/GATECH-EIC/ACT", license="", test="methods/test_act.py"
)
ENTRIES = [Entry("act", ACT, CARD("attention calibration"))]
