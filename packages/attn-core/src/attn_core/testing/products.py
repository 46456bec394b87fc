"""Seeded cases in which the mechanisms of an operator meet: causality × masks × biases × lengths × heads × scales.

One mechanism at a time is what ``cases`` has; what broke were combinations. The space of an operator's options is
sampled by a covering array: every combination of values of any two (or three) options occurs in some case.
"""

import functools
import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import attn_core
from attn_core.testing.harness import Case, tensor

SCALES = (None, 0.0, -0.7, 1.5)


def covering(options: dict[str, Sequence[Any]], strength: int, seed: int = 0) -> list[dict[str, Any]]:
    """Few assignments of the options in which every combination of values of any ``strength`` options occurs."""
    draw = random.Random(seed)
    names = list(options)
    groups = list(itertools.combinations(names, min(strength, len(names))))
    missing = {
        (group, values) for group in groups for values in itertools.product(*(range(len(options[n])) for n in group))
    }
    order = sorted(missing)
    draw.shuffle(order)
    rows = []
    while missing:
        group, values = next(entry for entry in order if entry in missing)
        best: tuple[int, dict[str, int]] = (0, {})
        for _ in range(20):
            row = {name: draw.randrange(len(options[name])) for name in names} | dict(zip(group, values, strict=True))
            gain = sum((other, tuple(row[n] for n in other)) in missing for other in groups)
            best = max(best, (gain, row), key=lambda entry: entry[0])
        row = best[1]
        missing -= {(other, tuple(row[n] for n in other)) for other in groups}
        order = [entry for entry in order if entry in missing]
        rows.append({name: options[name][i] for name, i in row.items()})
    return rows


def product_cases(operator: str, strength: int = 2) -> list[Case]:
    """Cases of one operator or composite, by its name."""
    build, options = BUILDERS[operator]
    function = getattr(attn_core, operator)
    rows = enumerate(covering(options, strength))
    return [Case(function, _name(row), functools.partial(_built, build, row, number)) for number, row in rows]


def _name(row: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in row.items() if value not in (None, False, ()))


def _built(
    build: Callable[..., tuple[list[Any], dict[str, Any]]],
    row: dict[str, Any],
    number: int,
    dtype: torch.dtype,
    device: str,
) -> tuple[list[Any], dict[str, Any]]:
    torch.manual_seed(number)
    return build(dtype, device, **row)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _heads(
    dtype: torch.dtype, device: str, batch: int, heads: int, tokens: int, width: int, layout: str = "plain"
) -> Tensor:
    if layout == "split":  # heads split from a wide projection, every second column
        wide = tensor(dtype, device, batch, tokens, heads, 2 * width, gradient=False)
        return wide[..., ::2].transpose(1, 2).requires_grad_()
    if layout == "transposed":  # tokens innermost
        return tensor(dtype, device, batch, heads, width, tokens, gradient=False).mT.requires_grad_()
    return tensor(dtype, device, batch, heads, tokens, width)


def _bias(dtype: torch.dtype, device: str, kind: str | None, batch: int, heads: int, queries: int, keys: int) -> Any:
    """A dense bias of some shape; all but ``"full"`` have entries of −inf."""
    if kind is None:
        return None
    shapes = {"keys": (batch, 1, 1, keys), "rows": (1, heads, queries, 1)}
    bias = tensor(dtype, device, *shapes.get(kind, (batch, heads, queries, keys)), gradient=False)
    if kind == "keys":
        bias[..., : keys // 2] = -math.inf
    elif kind == "rows":
        bias[:, :, queries // 2] = -math.inf
    elif kind == "holes":
        bias[torch.rand(bias.shape) < 0.4] = -math.inf
        bias[:, :, 0] = -math.inf
    return bias.requires_grad_()


def _mask(kind: str | None, batch: int, keys: int) -> Tensor | None:
    if kind is None:
        return None
    visible = torch.rand(1 if kind == "shared" else batch, keys) > 0.4
    if kind == "dead image":
        visible[0] = False
    elif kind == "late":  # queries that causality lets see the first keys alone see nothing
        visible[:] = torch.arange(keys) >= keys // 2
    return visible


def _axes(
    dtype: torch.dtype, device: str, sizes: Sequence[int], batch: int, heads: int, queries: int, closed: bool
) -> list[Tensor] | None:
    leading = [(batch, 1), (1, heads), (batch, heads), (1, 1)]
    tables = [tensor(dtype, device, *leading[a % 4], queries, n, gradient=False) for a, n in enumerate(sizes)]
    if closed:
        tables[0][..., 0] = -math.inf
    return [table.requires_grad_() for table in tables] or None


def _attention(
    dtype: torch.dtype,
    device: str,
    *,
    lengths: tuple[int, int],
    heads: tuple[int, int],
    causal: str | None,
    mask: str | None,
    bias: str | None,
    axes: str | None,
    scale: float | None,
    value_width: int,
    layout: str,
    window: tuple[int, int] | None = None,
    packed: str | None = None,
) -> tuple[list[Any], dict[str, Any]]:
    (queries, keys), (count, key_count) = lengths, heads
    args = [
        _heads(dtype, device, 2, count, queries, 8, layout),
        _heads(dtype, device, 2, key_count, keys, 8, layout),
        _heads(dtype, device, 2, key_count, keys, value_width),
    ]
    sizes = {None: (), "one": (keys,), "two": (2, keys // 2), "closed": (keys // 2, 2), "four": (1, 2, 1, keys // 2)}
    kwargs = {
        "scale": scale,
        "bias": _bias(dtype, device, bias, 2, count, queries, keys),
        "axis_bias": _axes(dtype, device, sizes[axes], 2, count, queries, axes == "closed"),
        "key_mask": _mask(mask, 2, keys),
        "causal": causal,
    }
    if window is not None:
        kwargs["window_size"] = window
    for name, starts in zip(("cu_seqlens_q", "cu_seqlens_k"), _sequences(packed, queries, keys), strict=False):
        kwargs[name] = torch.tensor(starts, device=device)
    return args, kwargs


def _sequences(kind: str | None, queries: int, keys: int) -> tuple[tuple[int, ...], ...]:
    """Where sequences begin, for queries and for keys; nothing where they are not packed."""
    if kind is None:
        return ()
    if kind == "whole":
        return (0, queries), (0, keys)
    if kind == "three":  # the second without a query
        return (0, queries // 3, queries // 3, queries), (0, keys // 2, keys * 2 // 3, keys)
    return (0, queries // 2, queries - 1), (0, 0, keys - 1)  # one without a key, tokens behind the last


def _group_attention(
    dtype: torch.dtype,
    device: str,
    *,
    factor: str | None,
    groups: int,
    own_groups: bool,
    axes: None = None,
    **row: Any,
) -> tuple[list[Any], dict[str, Any]]:
    args, kwargs = _attention(dtype, device, axes=axes, **row)
    del kwargs["axis_bias"]
    batch, heads, queries, _ = args[0].shape
    exact = _exact(dtype)
    if factor == "weight":
        kwargs["group_weight"] = tensor(exact, device, batch, heads, queries, groups)
    elif factor is not None:
        gate = tensor(exact, device, *((batch, 1, queries) if factor == "gate" else (1, heads, 1)), groups).detach()
        if factor == "closed gate":
            gate[..., 0] = -math.inf
        kwargs["group_gate"] = gate.requires_grad_()
    group = torch.randint(-1, groups, (batch if own_groups else 1, args[1].shape[2]))
    return [*args, group.to(device), groups], kwargs


def _block_attention(
    dtype: torch.dtype,
    device: str,
    *,
    heads: tuple[int, int],
    blocks: str,
    keys: int,
    table: str | None,
    weight: str | None,
    axes: str | None,
    causal: bool,
    positions: bool,
    self_logit: float | None,
    scale: float | None,
    value_width: int,
    layout: str,
) -> tuple[list[Any], dict[str, Any]]:
    queries, (count, key_count) = 10, heads
    args: list[Any] = [
        _heads(dtype, device, 2, count, queries, 8, layout),
        _heads(dtype, device, 2, key_count, keys, 8, layout),
        _heads(dtype, device, 2, key_count, keys, value_width),
    ]
    kwargs: dict[str, Any] = {"causal": causal, "self_logit": self_logit, "scale": scale}
    listed, slots = 4, 6
    if blocks == "windows":  # disjoint, the last of the queries in no block
        q_index = torch.randperm(queries)[:8].sort().values.view(1, 1, 4, 2)
        kv_index = torch.arange(4 * slots).view(1, 1, 4, slots) % keys
    else:
        rows = (2, count) if blocks == "clusters" else (1, 1)
        q_index = torch.randint(-1, queries, (*rows, listed, 3))
        kv_index = torch.randint(-1, keys, (2, key_count if blocks == "clusters" else 1, listed, slots))
        kwargs["reduce"] = "mean"
    args += [q_index.to(device), kv_index.to(device)]
    if table is not None:
        chosen = torch.randint(-1, listed, (2, count if table == "of heads" else 1, listed, 3))
        chosen[:, :, 1] = -1
        args.append(chosen.to(device))
    if weight is not None:
        kwargs["kv_weight"] = tensor(dtype, device, 2, count if weight == "of heads" else 1, listed, 3 if table else 1)
    sizes = {None: (), "one": (slots,), "two": (2, 3), "closed": (3, 2)}
    kwargs["axis_bias"] = _axes(dtype, device, sizes[axes], 2, count, queries, axes == "closed")
    if positions:
        kwargs["q_pos"] = torch.randint(0, queries, (2, queries)).to(device)
        kwargs["k_pos"] = torch.randint(-1, queries, (1, keys)).to(device)
    return args, kwargs


def _neighborhood_attention(
    dtype: torch.dtype,
    device: str,
    *,
    grid: tuple[int, ...],
    kernel: int,
    dilation: int,
    stride: int,
    causal: str | None,
    rpb: str | None,
    border: str,
    scale: float | None,
    value_width: int,
    layout: str,
) -> tuple[list[Any], dict[str, Any]]:
    if border == "shifted":
        dilation = min(dilation, min(grid) // kernel)
    stride = 1 if rpb else min(stride, kernel)
    args: list[Any] = []
    for width in (6, 6, value_width):
        if layout == "split":
            wide = tensor(dtype, device, 2, *grid, 2, 2 * width, gradient=False)
            args.append(wide[..., ::2].movedim(-2, 1).requires_grad_())
        else:
            args.append(tensor(dtype, device, 2, 2, *grid, width))
    flags = {None: (False,) * len(grid), "first": (True,) + (False,) * (len(grid) - 1), "all": (True,) * len(grid)}
    kwargs: dict[str, Any] = {"dilation": dilation, "stride": stride, "is_causal": flags[causal]}
    kwargs |= {"scale": scale, "border": border}
    if rpb:
        table = tensor(dtype, device, 2, *(2 * kernel - 1,) * len(grid), gradient=False)
        if rpb == "closed":
            table[torch.rand(table.shape) < 0.3] = -math.inf
        kwargs["rpb"] = table.requires_grad_()
    return [*args, kernel], kwargs


def _additive_attention(
    dtype: torch.dtype, device: str, *, lengths: tuple[int, int], value: int | None, mask: str | None, width: int,
    size: float, layout: str,
) -> tuple[list[Any], dict[str, Any]]:  # fmt: skip
    queries, keys = lengths

    def data(tokens: int, columns: int) -> Tensor:
        x = _heads(dtype, device, 2, 1, tokens, columns, layout).detach()[:, 0]
        return (x * size).requires_grad_()

    args: list[Any] = [data(queries, width), data(keys, width), tensor(dtype, device, width)]
    return [*args, *([] if value is None else [data(keys, value)])], {"key_mask": _mask(mask, 2, keys)}


def _merge_attention(
    dtype: torch.dtype, device: str, *, parts: int, dead: str | None, listed: bool, far: float, width: int, layout: str
) -> tuple[list[Any], dict[str, Any]]:
    outs = torch.stack([_heads(dtype, device, 2, 3, 5, width, layout).detach() for _ in range(parts)])
    lses = tensor(_exact(dtype), device, parts, 2, 3, 5, gradient=False) * far
    if dead is not None:
        lses[:, :, 0] = -math.inf
        lses[0, :, 1] = -math.inf
    if dead == "filled":
        outs[0, :, 1] = math.nan  # a part without keys may hold anything
    if listed:
        return [[x.clone().requires_grad_() for x in outs], [x.clone().requires_grad_() for x in lses]], {}
    return [outs.requires_grad_(), lses.requires_grad_()], {}


def _channel_attention(
    dtype: torch.dtype, device: str, *, tokens: int, channels: int, layout: str, **options: Any
) -> tuple[list[Any], dict[str, Any]]:
    return [_heads(dtype, device, 2, 2, tokens, channels, layout) for _ in range(3)], options


def _linear_attention(
    dtype: torch.dtype,
    device: str,
    *,
    lengths: tuple[int, int],
    causal: bool,
    decay: float | None,
    end: str | None,
    scale: float,
    value_width: int,
    chunk_size: int | None,
    layout: str,
) -> tuple[list[Any], dict[str, Any]]:
    queries, keys = lengths
    if causal:
        keys = queries
    args = [_heads(dtype, device, 2, 3, tokens, 4, layout) for tokens in (queries, keys)]
    if end == "normalized":
        args = [(x.detach().abs() + 0.5).requires_grad_() for x in args]
    kwargs: dict[str, Any] = {"causal": causal, "scale": scale, "chunk_size": chunk_size}
    exact = _exact(dtype)
    if decay is not None:
        kwargs["log_decay"] = (-decay * torch.rand(3, dtype=torch.float64)).to(device, exact).requires_grad_()
    if end == "normalized":
        kwargs |= {"normalize": True, "eps": 0.25}
    elif end == "state":
        kwargs["initial_state"] = tensor(exact, device, 2, 3, 4, value_width)
    return [*args, _heads(dtype, device, 2, 3, keys, value_width)], kwargs


def _agent_attention(
    dtype: torch.dtype,
    device: str,
    *,
    lengths: tuple[int, int],
    heads: tuple[int, int],
    agent_bias: str | None,
    query_bias: str | None,
    mask: str | None,
    scale: float | None,
    value_width: int,
    layout: str,
) -> tuple[list[Any], dict[str, Any]]:
    (queries, keys), (count, key_count), agents = lengths, heads, 3
    args = [
        _heads(dtype, device, 2, count, queries, 8, layout),
        _heads(dtype, device, 2, key_count, keys, 8, layout),
        _heads(dtype, device, 2, key_count, keys, value_width),
        _heads(dtype, device, 2, count, agents, 8, layout),
    ]
    kwargs = {
        "agent_bias": _bias(dtype, device, agent_bias, 2, count, agents, keys),
        "query_bias": _bias(dtype, device, query_bias, 2, count, queries, agents),
        "key_mask": _mask(mask, 2, keys),
        "scale": scale,
    }
    return args, kwargs


def _routed_heads(
    dtype: torch.dtype,
    device: str,
    *,
    lengths: tuple[int, int],
    heads: tuple[int, int],
    bias: str | None,
    scale: float | None,
    value_width: int,
    layout: str,
    closed: str | None,
) -> tuple[list[Any], dict[str, Any]]:
    (queries, keys), (count, key_count) = lengths, heads
    args = [
        _heads(dtype, device, 2, count, queries, 8, layout),
        _heads(dtype, device, 2, key_count, keys, 8, layout),
        _heads(dtype, device, 2, key_count, keys, value_width),
    ]
    gates = tensor(dtype, device, 2, queries, count, gradient=False)
    if closed == "some":
        gates[torch.rand(gates.shape) < 0.5] = 0
    elif closed == "a head":
        gates[:, :, -1] = 0
    elif closed == "all":
        gates[:] = 0
    return [*args, gates.requires_grad_()], {
        "scale": scale,
        "bias": _bias(dtype, device, bias, 2, count, queries, keys),
    }


def _landmark_attention(
    dtype: torch.dtype,
    device: str,
    *,
    tokens: int,
    block: int,
    heads: tuple[int, int],
    scale: float | None,
    value_width: int,
    layout: str,
) -> tuple[list[Any], dict[str, Any]]:
    q, k, v = (
        _heads(dtype, device, 2, count, tokens, width, layout)
        for count, width in zip((heads[0], *heads[1:], heads[1]), (8, 8, value_width), strict=True)
    )
    return [q, k, v, block], {"scale": scale}


def _redistribution(
    dtype: torch.dtype, device: str, *, p: float, query_mask: bool, sinks: str, axes: None = None, **row: Any
) -> tuple[list[Any], dict[str, Any]]:
    args, kwargs = _attention(dtype, device, axes=axes, **row)
    del kwargs["axis_bias"]
    batch, _, queries, _ = args[0].shape
    keys = args[1].shape[2]
    visual = torch.arange(keys).expand(1 if sinks == "shared" else batch, keys) % 3 < 2
    sink = torch.rand(batch, keys) < (1.0 if sinks == "all" else 0.4)
    kwargs |= {"p": p, "rho": 0.8, "summ": 0.1}
    if query_mask:
        kwargs["query_mask"] = torch.rand(batch, queries) < 0.7
    return [*args, visual, sink], kwargs


def _scatterbrain(
    dtype: torch.dtype, device: str, *, queries: int, per_head: bool, table: str | None, scale: float | None,
    value_width: int, layout: str,
) -> tuple[list[Any], dict[str, Any]]:  # fmt: skip
    keys = 9
    args: list[Any] = [
        _heads(dtype, device, 2, 2, tokens, width, layout)
        for tokens, width in ((queries, 4), (keys, 4), (keys, value_width))
    ]
    rows = (2, 2) if per_head else (1, 1)
    places = [torch.stack([torch.randperm(n)[:6] for _ in range(4)]).view(2, 2, 3, 2) for n in (queries, keys)]
    q_index, kv_index = (x[: rows[0], : rows[1]].clone() for x in places)
    kv_index[..., 2, 1] = -1
    args += [tensor(dtype, device, 16, 4, gradient=False), q_index, kv_index]
    if table is not None:
        chosen = torch.stack([torch.randperm(3)[:2] for _ in range(3)]).view(1, 1, 3, 2)
        if table == "holes":
            chosen[:, :, 0] = -1
        args.append(chosen)
    return args, {"scale": scale}


def _inline_attention(
    dtype: torch.dtype, device: str, *, tokens: int, width: int, value_width: int, scale: float | None, layout: str
) -> tuple[list[Any], dict[str, Any]]:
    widths = (width, width, value_width)
    return [_heads(dtype, device, 2, 2, tokens, w, layout) for w in widths], {"scale": scale}


def _rank_augmented_attention(
    dtype: torch.dtype, device: str, *, tokens: int, turned: bool, value_width: int, scale: float | None, layout: str
) -> tuple[list[Any], dict[str, Any]]:
    kwargs: dict[str, Any] = {"scale": scale}
    if turned:
        angle = torch.rand(tokens, 3, dtype=torch.float64).repeat_interleave(2, dim=1)
        kwargs |= {"sin": angle.sin().to(device, dtype), "cos": angle.cos().to(device, dtype)}
    return [_heads(dtype, device, 2, 2, tokens, w, layout) for w in (6, 6, value_width)], kwargs


SOFTMAX: dict[str, Sequence[Any]] = {
    "lengths": ((5, 8), (8, 4), (6, 6), (1, 6)),
    "heads": ((2, 2), (4, 2), (2, 1)),
    "causal": (None, "upper_left", "lower_right"),
    "mask": (None, "random", "dead image", "late"),
    "bias": (None, "full", "holes", "keys", "rows"),
    "scale": SCALES,
    "value_width": (8, 5, 20),
    "layout": ("plain", "split", "transposed"),
}

BUILDERS: dict[str, tuple[Callable[..., tuple[list[Any], dict[str, Any]]], dict[str, Sequence[Any]]]] = {
    "attention": (
        _attention,
        SOFTMAX
        | {
            "axes": (None, "one", "two", "closed", "four"),
            "window": (None, (2, 1), (0, -1), (-1, 1), (1, 0)),
            "packed": (None, "whole", "three", "short"),
        },
    ),
    "group_attention": (
        _group_attention,
        SOFTMAX | {"factor": (None, "weight", "gate", "closed gate"), "groups": (3, 1, 9), "own_groups": (False, True)},
    ),
    "agent_attention": (
        _agent_attention,
        {name: SOFTMAX[name] for name in ("lengths", "heads", "mask", "scale", "value_width", "layout")}
        | {"agent_bias": (None, "full", "holes", "keys", "rows"), "query_bias": (None, "full", "holes", "rows")},
    ),
    "routed_heads": (
        _routed_heads,
        {name: SOFTMAX[name] for name in ("lengths", "heads", "scale", "value_width", "layout")}
        | {"bias": (None, "full", "holes", "keys", "rows"), "closed": (None, "some", "a head", "all")},
    ),
    "landmark_attention": (
        _landmark_attention,
        {
            "tokens": (12, 1, 11, 5),
            "block": (4, 5, 2, 9),
            "heads": ((2, 2), (4, 2), (2, 1)),
            "scale": SCALES,
            "value_width": (8, 3),
            "layout": ("plain", "split", "transposed"),
        },
    ),
    "visual_attention_redistribution": (
        _redistribution,
        SOFTMAX | {"p": (0.6, 0.0, 1.0), "query_mask": (False, True), "sinks": ("some", "shared", "all")},
    ),
    "scatterbrain": (
        _scatterbrain,
        {
            "queries": (7, 9),
            "per_head": (False, True),
            "table": (None, "full", "holes"),
            "scale": (None, 0.3, 1.0),
            "value_width": (4, 3),
            "layout": ("plain", "split", "transposed"),
        },
    ),
    "inline_attention": (
        _inline_attention,
        {
            "tokens": (9, 1, 16),
            "width": (4, 7),
            "value_width": (5, 1),
            "scale": SCALES,
            "layout": ("plain", "split", "transposed"),
        },
    ),
    "rank_augmented_attention": (
        _rank_augmented_attention,
        {
            "tokens": (9, 1, 5),
            "turned": (False, True),
            "value_width": (5, 1),
            "scale": SCALES,
            "layout": ("plain", "split", "transposed"),
        },
    ),
    "block_attention": (
        _block_attention,
        {
            "heads": ((4, 4), (4, 2), (2, 1)),
            "blocks": ("windows", "shared clusters", "clusters"),
            "keys": (10, 17, 5),
            "table": (None, "shared", "of heads"),
            "weight": (None, "shared", "of heads"),
            "axes": (None, "one", "two", "closed"),
            "causal": (False, True),
            "positions": (False, True),
            "self_logit": (None, -3.0, -math.inf),
            "scale": SCALES,
            "value_width": (8, 5),
            "layout": ("plain", "split", "transposed"),
        },
    ),
    "neighborhood_attention": (
        _neighborhood_attention,
        {
            "grid": ((11,), (5, 7), (3, 4, 3)),
            "kernel": (3, 2, 1),
            "dilation": (1, 2),
            "stride": (1, 2),
            "causal": (None, "first", "all"),
            "rpb": (None, "full", "closed"),
            "border": ("shifted", "truncated"),
            "scale": SCALES,
            "value_width": (6, 3),
            "layout": ("plain", "split"),
        },
    ),
    "additive_attention": (
        _additive_attention,
        {
            "lengths": ((5, 7), (7, 3), (1, 9), (4, 1)),
            "value": (None, 6, 3),
            "mask": (None, "random", "dead image", "shared"),
            "width": (8, 13, 1),
            "size": (1.0, 30.0),
            "layout": ("plain", "split", "transposed"),
        },
    ),
    "merge_attention": (
        _merge_attention,
        {
            "parts": (3, 1, 2, 8),
            "dead": (None, "empty", "filled"),
            "listed": (False, True),
            "far": (1.0, 300.0),
            "width": (8, 5),
            "layout": ("plain", "split", "transposed"),
        },
    ),
    "channel_attention": (
        _channel_attention,
        {
            "tokens": (10, 1, 37),
            "channels": (8, 20, 1),
            "scale": (0.3, 0.0, -0.7, 20.0),
            "negate_max": (False, True),
            "transpose": (False, True),
            "layout": ("plain", "split", "transposed"),
        },
    ),
    "linear_attention": (
        _linear_attention,
        {
            "lengths": ((11, 11), (5, 13), (13, 4), (1, 9), (6, 0)),
            "causal": (True, False),
            "decay": (None, 1.0, 30.0),
            "end": (None, "normalized", "state"),
            "scale": (1.0, 0.0, -0.5),
            "value_width": (5, 1),
            "chunk_size": (None, 4, 1),
            "layout": ("plain", "split", "transposed"),
        },
    ),
}
