"""The operators and composites by their definitions in float64: one query at a time, over the list of keys it sees.

Nothing here is shared with a backend, the reference included: a mistake in how mechanisms meet (causality beside a
mask, a sign of the scale, a row that sees nothing) shows as a difference. ``DEFINITIONS`` maps an operator's name to a
function of the operator's arguments.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor


def _row(logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax average and log-sum-exp over the entries whose logit is not −inf: 0 and −inf if there is none."""
    seen = logits.detach() > -math.inf
    if not bool(seen.any()):
        return values.new_zeros(values.shape[1]), logits.new_full((), -math.inf)
    logits, values = logits[seen], values[seen]
    lse = torch.logsumexp(logits, 0)
    return torch.exp(logits - lse) @ values, lse


def _at(x: Tensor, *place: int) -> Tensor:
    """x[place], where a dimension of size 1 stands for all."""
    return x[tuple(i % size for i, size in zip(place, x.shape, strict=False))]


def _stack(rows: list[Tensor], *shape: int, like: Tensor) -> Tensor:
    return torch.stack(rows).reshape(*shape, *rows[0].shape) if rows else like.new_zeros(*shape, 0)


def _visible(i: int, queries: int, keys: int, causal: str | None) -> list[int]:
    last = {None: keys - 1, "upper_left": i, "lower_right": i + keys - queries}[causal]
    return [j for j in range(keys) if j <= last]


def _in_sequence(
    i: int, starts: list[int], key_starts: list[int], causal: str | None, window: tuple[int, int]
) -> list[int]:
    """Keys that query i sees in its sequence, by causality and a window around the diagonal."""
    for begin, end, first, stop in zip(starts, starts[1:], key_starts, key_starts[1:], strict=False):
        if begin <= i < end:
            n, m = end - begin, stop - first
            diagonal = i - begin if causal == "upper_left" else i - begin + m - n
            low, high = (diagonal - window[0] if window[0] >= 0 else 0), (diagonal + window[1] if window[1] >= 0 else m)
            return [first + j for j in _visible(i - begin, n, m, causal) if low <= j <= high]
    return []


def _axis_row(tables: Sequence[Tensor] | None, keys: int, *place: int) -> Tensor:
    """Σ_a T_a[place, coordinate of the key along axis a], keys row-major."""
    total = torch.zeros(keys, dtype=torch.float64)
    sizes = [table.shape[-1] for table in tables or ()]
    for axis, table in enumerate(tables or ()):
        coordinate = [j // math.prod(sizes[axis + 1 :]) % sizes[axis] for j in range(keys)]
        total = total + _at(table.double(), *place)[coordinate]
    return total


def _logits(
    q: Tensor, k: Tensor, keys: list[int], place: tuple[int, int, int], scale: float | None, bias: Tensor | None
) -> Tensor:
    b, h, i = place
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    own = k.double()[b, h // (q.shape[1] // k.shape[1])]
    s = own[keys] @ q.double()[b, h, i] * factor
    return s if bias is None else s + _at(bias.double(), b, h, i).expand(k.shape[2])[keys]


def _places(*sizes: int) -> Iterator[tuple[int, ...]]:
    return product(*(range(size) for size in sizes))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    axis_bias: Sequence[Tensor] | None = None,
    key_mask: Tensor | None = None,
    causal: str | None = None,
    window_size: tuple[int, int] | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse): Σ_j softmax_j(scale·q_i·k_j + biases) v_j over the keys that query i sees."""
    B, H, N, _ = q.shape
    M = k.shape[2]
    key_starts = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    starts = [[0, size] if x is None else x.tolist() for x, size in ((cu_seqlens_q, N), (key_starts, M))]
    outs, lses = [], []
    for b, h, i in _places(B, H, N):
        seen = _in_sequence(i, *starts, causal, window_size or (-1, -1))  # pyright: ignore[reportCallIssue]
        keys = [j for j in seen if key_mask is None or bool(_at(key_mask, b, j))]
        s = _logits(q, k, keys, (b, h, i), scale, bias) + _axis_row(axis_bias, M, b, h, i)[keys]
        out, lse = _row(s, v.double()[b, h // (H // k.shape[1])][keys])
        outs.append(out)
        lses.append(lse)
    return _stack(outs, B, H, N, like=v), torch.stack(lses).view(B, H, N)


def group_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Tensor,
    num_groups: int,
    *,
    group_weight: Tensor | None = None,
    group_gate: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse of each group): softmax over all keys, or as weights and gates of their groups say."""
    B, H, N, _ = q.shape
    outs, masses = [], []
    for b, h, i in _places(B, H, N):
        shown = [j for j in _visible(i, N, k.shape[2], causal) if key_mask is None or bool(_at(key_mask, b, j))]
        parts = []
        for g in range(num_groups):
            keys = [j for j in shown if int(_at(group, b, j)) == g]
            parts.append(_row(_logits(q, k, keys, (b, h, i), scale, bias), v.double()[b, h // (H // k.shape[1])][keys]))
        averages, mass = torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])
        if group_weight is not None:
            out = _at(group_weight.double(), b, h, i) @ averages
        else:
            gate = mass if group_gate is None else _at(group_gate.double(), b, h, i)
            filled = [g for g in range(num_groups) if float(mass[g].detach()) > -math.inf]
            out, _ = _row(gate[filled], averages[filled])
        outs.append(out)
        masses.append(mass)
    return _stack(outs, B, H, N, like=v), torch.stack(masses).view(B, H, N, num_groups)


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    kv_index: Tensor,
    table: Tensor | None = None,
    *,
    kv_weight: Tensor | None = None,
    axis_bias: Sequence[Tensor] | None = None,
    causal: bool = False,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    self_logit: float | None = None,
    scale: float | None = None,
    reduce: str = "set",
) -> tuple[Tensor, Tensor]:
    """(out, lse): each query reads the blocks that its own block lists."""
    B, H, N, D = q.shape
    factor = D**-0.5 if scale is None else scale
    slots = kv_index.shape[3]
    found: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
    for b, h, r in _places(B, H, q_index.shape[2]):
        hk = h // (H // k.shape[1])
        listed = [r] if table is None else _at(table, b, h, r).tolist()
        entries = [  # (table slot, slot in the key block, token)
            (c, j, u)
            for c, block in enumerate(listed)
            if block >= 0
            for j, u in enumerate(_at(kv_index, b, hk, block).tolist())
            if u >= 0
        ]
        w = torch.ones(len(listed), dtype=torch.float64)
        if kv_weight is not None:
            w = _at(kv_weight.double(), b, h, r)
        for t in _at(q_index, b, h, r).tolist():
            if t < 0:
                continue
            q_at = t if q_pos is None else int(_at(q_pos, b, t))
            at = [u if k_pos is None else int(_at(k_pos, b, u)) for _, _, u in entries]
            seen = [n for n, k_at in enumerate(at) if not causal or k_at <= q_at]
            slot, place, token = ([entries[n][part] for n in seen] for part in range(3))
            weight = w[slot].unsqueeze(1)
            s = factor * ((weight * k.double()[b, hk, token]) @ q.double()[b, h, t])
            s = s + _axis_row(axis_bias, slots, b, h, t)[place]
            if self_logit is not None:
                s = torch.where(torch.tensor([at[n] == q_at for n in seen], dtype=torch.bool), self_logit, s)
            found.setdefault((b, h, t), []).append(_row(s, weight * v.double()[b, hk, token]))
    outs, lses = [], []
    for place in _places(B, H, N):
        rows = found.get(place, [])
        dead = q.new_full((), -math.inf, dtype=torch.float64)
        assert reduce == "mean" or len(rows) <= 1
        outs.append(torch.stack([out for out, _ in rows]).mean(0) if rows else v.double().new_zeros(v.shape[3]))
        lses.append(rows[0][1] if len(rows) == 1 else dead)
    return torch.stack(outs).view(B, H, N, -1), torch.stack(lses).view(B, H, N)


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Any,
    *,
    dilation: Any = 1,
    stride: Any = 1,
    is_causal: Any = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    border: str = "shifted",
) -> tuple[Tensor, Tensor]:
    """(out, lse): each cell reads its window, moved inside at the border or cut there."""
    grid = q.shape[2:-1]
    each = [x if isinstance(x, (tuple, list)) else (x,) * len(grid) for x in (kernel_size, dilation, stride, is_causal)]
    seen = [_window(*rules, border) for rules in zip(grid, *each, strict=True)]  # pyright: ignore[reportCallIssue]
    cells = list(_places(*grid))
    Q, K, V = (x.double().flatten(2, -2) for x in (q, k, v))
    outs, lses = [], []
    for b, h in _places(*q.shape[:2]):
        for i, cell in enumerate(cells):
            axes = [allowed[c] for allowed, c in zip(seen, cell, strict=True)]
            keys = [j for j, other in enumerate(cells) if all(o in a for a, o in zip(axes, other, strict=True))]
            s = _logits(Q, K, keys, (b, h, i), scale, None)
            if rpb is not None:
                offsets = [
                    tuple((o - c) // d + n - 1 for o, c, d, n in zip(cells[j], cell, each[1], each[0], strict=True))
                    for j in keys
                ]
                s = s + torch.stack([rpb.double()[(h, *offset)] for offset in offsets])
            out, lse = _row(s, V[b, h][keys])
            outs.append(out)
            lses.append(lse)
    shape = (*q.shape[:2], *grid)
    return torch.stack(outs).view(*shape, -1), torch.stack(lses).view(shape)


def _window(length: int, kernel: int, dilation: int, stride: int, causal: bool, border: str) -> list[set[int]]:
    """For each cell of an axis the cells that it sees, by the words of the operator's docstring."""
    seen = []
    for i in range(length):
        own = list(range(i % dilation, length, dilation))  # the cells of its residue
        p, n = i // dilation, len(own)
        group = list(range(p // stride * stride, p // stride * stride + stride))
        leader = min(group[-1] if causal else group[stride // 2], n - 1)
        if causal:
            window = range(leader - kernel + 1, p + 1)
        else:
            start = leader - kernel // 2
            if border == "shifted":
                start = max(0, min(start, n - kernel))
            window = range(start, start + kernel)
        seen.append({own[w] for w in window if 0 <= w < n})
    return seen


def additive_attention(
    q: Tensor, k: Tensor, w: Tensor, value: Tensor | None = None, *, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(scores or Σ_j p_ij v_j, lse) of s_ij = w·tanh(q_i + k_j)."""
    B, N, _ = q.shape
    M = k.shape[1]
    results, lses = [], []
    for b, i in _places(B, N):
        s = torch.tanh(k.double()[b] + q.double()[b, i]) @ w.double()
        if key_mask is not None:
            s = torch.where(key_mask[b % key_mask.shape[0]], s, -math.inf)
        out, lse = _row(s, s.new_zeros(M, 0) if value is None else value.double()[b])
        results.append(s if value is None else out)
        lses.append(lse)
    return torch.stack(results).view(B, N, -1), torch.stack(lses).view(B, N)


def merge_attention(outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of the union of the parts' keys."""
    size = lses[0].shape
    rows = [
        _row(
            torch.stack([lse[place] for lse in lses]).double(),
            torch.stack([out[place] for out in outs]).double(),
        )
        for place in _places(*size)
    ]
    return torch.stack([out for out, _ in rows]).view(*size, -1), torch.stack([lse for _, lse in rows]).view(size)


def channel_attention(
    a: Tensor, b: Tensor, x: Tensor, *, scale: float = 1.0, negate_max: bool = False, transpose: bool = False
) -> Tensor:
    """Channels read each other by the products of their columns."""
    maps = []
    for image, head in _places(*a.shape[:2]):
        rows = []
        for c in range(a.shape[3]):
            e = scale * (a.double()[image, head, :, c] @ b.double()[image, head])
            rows.append(_row(-e if negate_max else e, torch.eye(len(e), dtype=torch.float64))[0])
        A = torch.stack(rows)
        maps.append(x.double()[image, head] @ (A if transpose else A.T))
    return torch.stack(maps).view(x.shape)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    causal: bool = True,
    scale: float = 1.0,
    normalize: bool = False,
    eps: float = 0.0,
    initial_state: Tensor | None = None,
    chunk_size: int | None = None,  # noqa: ARG001  changes nothing in the result
) -> tuple[Tensor, Tensor]:
    """(out, state): Σ_j decay^(i−j) (q_i·k_j) v_j, summed pair by pair."""
    B, H, N, D = q.shape
    M, E = v.shape[2:]
    outs, states = [], []
    for b, h in _places(B, H):
        log = torch.zeros((), dtype=torch.float64) if log_decay is None else log_decay.double()[h]
        Q, K, V = (x.double()[b, h] for x in (q, k, v))
        S = torch.zeros(D, E, dtype=torch.float64) if initial_state is None else initial_state.double()[b, h]
        for i in range(N):
            keys = range(min(i + 1, M) if causal else M)
            distance = torch.tensor([abs(i - j) for j in keys], dtype=torch.float64)
            s = scale * torch.exp(log * distance) * (K[list(keys)] @ Q[i])
            out = s @ V[list(keys)] + scale * torch.exp(log * (i + 1)) * (Q[i] @ S)
            outs.append(out / (s.sum() + eps) if normalize else out)
        for j in range(M):
            S = torch.exp(log) * S + torch.outer(K[j], V[j])
        states.append(S)
    return torch.stack(outs).view(B, H, N, E), torch.stack(states).view(B, H, D, E)


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    *,
    agent_bias: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Agents read the keys, queries read the agents."""
    collected, _ = attention(agents, k, v, scale=scale, bias=agent_bias, key_mask=key_mask)
    return attention(q, agents, collected, scale=scale, bias=query_bias)[0]


def routed_heads(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, *, scale: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """Attention times the gate of its token and head, the pairs with a gate of 0 cut off from all gradients."""
    gates = torch.where(gates == 0, gates.detach(), gates).double().permute(0, 2, 1)[..., None]
    return gates * attention(q, k, v, scale=scale, bias=bias)[0]


def landmark_attention(
    q: Tensor, k: Tensor, v: Tensor, block: int, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse): own block and landmarks share one softmax, each landmark's weight is split within its block."""
    B, H, N, _ = q.shape
    outs, lses = [], []
    for b, h, i in _places(B, H, N):
        own = i // block
        tokens = [j for j in range(own * block, i + 1) if j % block != block - 1]
        landmarks = [n * block + block - 1 for n in range(own)]
        own_values = v.double()[b, h // (H // k.shape[1])]
        values = [own_values[tokens]]
        for landmark in landmarks:  # what a landmark gets is shared by the other tokens of its block
            members = list(range(landmark - block + 1, landmark))
            shared, _ = _row(_logits(q, k, members, (b, h, i), scale, None), own_values[members])
            values.append(shared[None])
        out, lse = _row(_logits(q, k, tokens + landmarks, (b, h, i), scale, None), torch.cat(values))
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs).view(B, H, N, -1), torch.stack(lses).view(B, H, N)


def visual_attention_redistribution(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visual: Tensor,
    sink: Tensor,
    *,
    rho: float = 0.5,
    summ: float = 0.2,
    p: float = 0.6,
    query_mask: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, which queries changed): queries that look at the image give 1 − p of their sinks' weight to its tokens."""
    B, H, N, _ = q.shape
    M = k.shape[2]
    outs, chosen = [], []
    for b, h, i in _places(B, H, N):
        shown = [j for j in range(M) if key_mask is None or bool(_at(key_mask, b, j))]
        keys = [j for j in _visible(i, N, M, causal) if j in shown]
        values = v.double()[b, h // (H // k.shape[1])][keys]
        s = _logits(q, k, keys, (b, h, i), scale, bias)
        share, _ = _row(s, torch.eye(len(keys), dtype=torch.float64))
        image, hole = (
            torch.tensor([bool(_at(flags, b, j)) for j in keys], dtype=torch.bool) for flags in (visual, sink)
        )
        mass = {name: share[own].sum() for name, own in
                {"vs": image & hole, "v": image & ~hole, "ts": ~image & hole}.items()}  # fmt: skip
        count = sum(bool(_at(visual, b, j)) for j in shown)
        looks = (
            float(mass["vs"].detach()) <= rho * float((mass["v"] + mass["vs"]).detach() + 1e-6 * count)
            and float((mass["v"] + mass["vs"]).detach()) >= summ
            and float(mass["v"].detach()) > 0
            and any(bool(_at(visual, b, j)) and bool(_at(sink, b, j)) for j in shown)
            and (query_mask is None or bool(_at(query_mask, b, i)))
        )
        if looks:
            grown = 1 + (1 - p) * (mass["vs"] + mass["ts"]) / mass["v"]
            share = torch.where(hole, p * share, torch.where(image, grown * share, share))
        outs.append(share @ values)
        chosen.append(torch.tensor(looks))
    return torch.stack(outs).view(B, H, N, -1), torch.stack(chosen).view(B, H, N)


def scatterbrain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    q_index: Tensor,
    kv_index: Tensor,
    table: Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse): exact scores where listed, those of random features elsewhere."""
    B, H, N, D = q.shape
    factor = D**-0.5 if scale is None else scale

    def features(x: Tensor) -> Tensor:
        w = projection.double() * math.sqrt(factor)
        log = torch.cat([w, -w]) @ x - factor * (x @ x) / 2
        return torch.exp(log) / math.sqrt(2 * len(projection))

    outs, lses = [], []
    for b, h, i in _places(B, H, N):
        listed = []
        for r in range(q_index.shape[2]):
            if i in _at(q_index, b, h, r).tolist():
                blocks = [r] if table is None else [c for c in _at(table, b, h, r).tolist() if c >= 0]
                listed = [j for c in blocks for j in _at(kv_index, b, h, c).tolist() if j >= 0]
        keys, phi = k.double()[b, h], features(q.double()[b, h, i])
        weights = [
            torch.exp(factor * (q.double()[b, h, i] @ keys[j])) if j in listed else phi @ features(keys[j])
            for j in range(len(keys))
        ]
        weight = torch.stack(weights)
        outs.append(weight @ v.double()[b, h] / weight.sum())
        lses.append(weight.sum().log())
    return torch.stack(outs).view(B, H, N, -1), torch.stack(lses).view(B, H, N)


def inline_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Scores plus 1 minus their mean, over their number, as weights of the values."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    rows = []
    for b, h, i in _places(*q.shape[:3]):
        s = factor * (k.double()[b, h] @ q.double()[b, h, i])
        rows.append((s + 1 - s.mean()) / len(s) @ v.double()[b, h])
    return torch.stack(rows).view(*q.shape[:3], -1)


def rank_augmented_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sin: Tensor | None = None,
    cos: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Linear attention of turned ELU features; keys weigh N times the softmax of their products with the mean query."""
    B, H, N, D = q.shape
    factor = D**-0.5 if scale is None else scale

    def turned(x: Tensor, i: int) -> Tensor:
        if sin is None or cos is None:
            return x
        swapped = torch.stack([-x[1::2], x[::2]], dim=-1).flatten()
        return x * cos.double()[i] + swapped * sin.double()[i]

    rows = []
    for b, h in _places(B, H):
        Q, K = (torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0))) for x in (q.double()[b, h], k.double()[b, h]))
        weight = N * torch.softmax(factor * (K @ Q.mean(0)), 0)
        K = weight[:, None] * K
        turned_k = torch.stack([turned(K[j], j) for j in range(N)])
        for i in range(N):
            s = turned_k @ turned(Q[i], i) / N
            rows.append(s @ v.double()[b, h] / (Q[i] @ K.mean(0) + eps))
    return torch.stack(rows).view(B, H, N, -1)


DEFINITIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        additive_attention,
        agent_attention,
        attention,
        block_attention,
        channel_attention,
        group_attention,
        inline_attention,
        landmark_attention,
        linear_attention,
        merge_attention,
        neighborhood_attention,
        rank_augmented_attention,
        routed_heads,
        scatterbrain,
        visual_attention_redistribution,
    )
}
