"""State-space blocks against loops over tokens: orders of visits by sorting coordinates, scans token by token."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attn_core.testing import peak_memory
from medical_seg.layers.state_space import BLOCKS, create_block, list_blocks
from medical_seg.layers.state_space.walks import StateSpaces, walk

State = dict[str, Tensor]
GRIDS = {1: (5,), 2: (3, 5), 3: (2, 3, 3)}
OPTIONS: dict[str, dict[str, Any]] = {"windowed": {"window": 2}, "ssd": {"head_dim": 3}, "multi_head": {"heads": 3}}
CASES = [(name, dims) for name in list_blocks() for dims in BLOCKS.card(name).dims]  # type: ignore[attr-defined]
LOOPED = [case for case in CASES if case[0] not in ("ss2d", "multi_head")]  # these in tests/models


def stirred(name: str, dims: int, dim: int = 3) -> Any:
    """A block in float64 whose parameters are all away from their start values."""
    torch.manual_seed(0)
    block: Any = create_block(name, dim, spatial_dims=dims, states=2, **OPTIONS.get(name, {})).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return block


def places(grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(product(*(range(side) for side in grid)))


def scanned(state: State, k: int, tokens: list[Tensor]) -> list[Tensor]:
    """One walk over tokens (B, C), one after the other."""
    ways, channels, rank = state["dt_projs_weight"].shape
    decay = -state["A_logs"].view(ways, channels, -1)[k].exp()
    width = decay.shape[1]
    h, out = torch.zeros(len(tokens[0]), channels, width, dtype=torch.float64), []
    for x in tokens:
        found = x @ state["x_proj_weight"][k].T
        low, entry, leave = found[:, :rank], found[:, rank : rank + width], found[:, rank + width :]
        step = torch.log1p(torch.exp(low @ state["dt_projs_weight"][k].T + state["dt_projs_bias"][k]))
        h = torch.exp(step[..., None] * decay) * h + (step * x)[..., None] * entry[:, None]
        out.append((h * leave[:, None]).sum(-1) + state["Ds"].view(ways, channels)[k] * x)
    return out


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def normalized(x: Tensor, state: State, name: str, dims: tuple[int, ...] = (-1,)) -> Tensor:
    centered = x - x.mean(dims, keepdim=True)
    scaled = centered / (centered.square().mean(dims, keepdim=True) + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Of side 3 with zeros around, channels last; one channel in means depthwise."""
    grid = x.shape[1:-1]
    padded = F.pad(x, (0, 0, *[1, 1] * len(grid)))
    total = bias
    for offsets in product(range(weight.shape[2]), repeat=len(grid)):
        shift = [o + (1 if weight.shape[2] == 1 else 0) for o in offsets]
        part = padded[(slice(None), *(slice(o, o + side) for o, side in zip(shift, grid, strict=True)))]
        tap = weight[(slice(None), slice(None), *offsets)]
        total = total + (part * tap[:, 0] if tap.shape[1] == 1 and len(tap) == x.shape[-1] else part @ tap.T)
    return total


def causal(tokens: list[Tensor], weight: Tensor, bias: Tensor) -> list[Tensor]:
    """Each token with those before it, weight (C, W)."""
    width, out = weight.shape[1], []
    for t in range(len(tokens)):
        total = bias
        for back in range(min(width, t + 1)):
            total = total + tokens[t - back] * weight[:, width - 1 - back]
        out.append(silu(total))
    return out


def routed(block: Any, state: State, x: Tensor, name: str) -> Tensor:
    grid = tuple(x.shape[1:-1])
    inner, gate = (x @ state["in_proj.weight"].T).chunk(2, -1)
    maps = silu(convolved(inner, state["conv.weight"], state["conv.bias"]))
    at = places(grid)
    axes = range(len(grid))
    total = {place: torch.zeros_like(maps[(slice(None), *place)]) for place in at}
    walks: list[list[tuple[int, ...]]] = []
    if name == "ss3d":
        walks = [sorted(at, key=lambda p, a=a: (*(p[i] for i in axes if i != a), p[a])) for a in reversed(axes)]
    elif name == "windowed":
        walks = [at, sorted(at, key=lambda p: (*(i // block.window for i in p), *p))]
    if walks:
        walks += [order[::-1] for order in walks]
    else:
        for starts in product(range(block.step), repeat=len(grid)):
            first = starts[::-1]
            part = [p for p in at if all(i % block.step == o for i, o in zip(p, first, strict=True))]
            walks.append(sorted(part, key=lambda p: (*p[1:], p[0])) if first[0] % 2 else part)
    for k, order in enumerate(walks):
        if order:
            for place, y in zip(order, scanned(state, k, [maps[(slice(None), *p)] for p in order]), strict=True):
                total[place] = total[place] + y
    y = torch.stack([total[p] for p in at], 1).view(maps.shape)
    return (normalized(y, state, "out_norm") * silu(gate)) @ state["out_proj.weight"].T


def sequences(state: State, x: Tensor) -> Tensor:
    at = places(tuple(x.shape[1:-1]))
    orders = [at, at[::-1], sorted(at, key=lambda p: (*p[1:], p[0]))][: len(state["conv_bias"])]
    inner, gate = (x @ state["in_proj.weight"].T).chunk(2, -1)
    total = {place: torch.zeros_like(inner[(slice(None), *place)]) for place in at}
    for k, order in enumerate(orders):
        mixed = causal([inner[(slice(None), *p)] for p in order], state["conv_weight"][k], state["conv_bias"][k])
        for place, y in zip(order, scanned(state, k, mixed), strict=True):
            total[place] = total[place] + y
    y = torch.stack([total[p] for p in at], 1).view(inner.shape)
    return (y * silu(gate)) @ state["out_proj.weight"].T


def umamba(state: State, x: Tensor) -> Tensor:
    over = tuple(range(1, x.ndim - 1))

    def leaky(y: Tensor) -> Tensor:
        return torch.where(y > 0, y, 0.01 * y)

    y = leaky(normalized(convolved(x, state["conv1.weight"], state["conv1.bias"]), state, "norm1", over))
    y = normalized(convolved(y, state["conv2.weight"], state["conv2.bias"]), state, "norm2", over)
    y = leaky(y + convolved(x, state["conv3.weight"], state["conv3.bias"]))
    own = {key.removeprefix("mamba."): value for key, value in state.items() if key.startswith("mamba.")}
    return sequences(own, normalized(y, state, "norm"))


def ssd(block: Any, state: State, x: Tensor) -> Tensor:
    heads, width, n = len(state["D"]), block.head_dim, block.states
    inner = heads * width
    z, mixed, step = (x.flatten(1, -2) @ state["in_proj.weight"].T).split([inner, inner + 2 * n, heads], -1)
    mixed = causal(list(mixed.unbind(1)), state["conv1d.weight"][:, 0], state["conv1d.bias"])
    h, out = torch.zeros(len(x), heads, width, n, dtype=torch.float64), []
    for token, dt in zip(mixed, step.unbind(1), strict=True):
        u, entry, leave = token[:, :inner].view(-1, heads, width), token[:, inner : inner + n], token[:, inner + n :]
        dt = torch.log1p(torch.exp(dt + state["dt_bias"]))
        h = torch.exp(-dt * state["A_log"].exp())[..., None, None] * h
        h = h + (dt[..., None] * u)[..., None] * entry[:, None, None]
        out.append(((h * leave[:, None, None]).sum(-1) + state["D"][:, None] * u).flatten(1))
    y = torch.stack(out, 1) * silu(z)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state["norm.weight"]
    return (y @ state["out_proj.weight"].T).view(x.shape)


def plain(block: Any, state: State, x: Tensor, name: str) -> Tensor:
    if name in ("s6", "bimamba", "tri_oriented"):
        return sequences(state, x)
    if name == "umamba":
        return umamba(state, x)
    return ssd(block, state, x) if name == "ssd" else routed(block, state, x, name)


@pytest.mark.parametrize(("name", "dims"), LOOPED)
def test_outputs_and_gradients_equal_a_plain_loop_over_tokens(name: str, dims: int) -> None:
    block = stirred(name, dims)
    state = {key: value.detach().clone().requires_grad_() for key, value in block.state_dict().items()}
    x, y = (torch.randn(2, *GRIDS[dims], 3, dtype=torch.float64).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    ours, expected = block(x), plain(block, state, y, name)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-11)
    weight = torch.randn_like(x)
    (ours * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-10)
    for key, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.grad, state[key].grad, rtol=1e-9, atol=1e-10, msg=key)


def test_a_plane_scanned_along_each_axis_is_ss2d() -> None:
    planar, general = stirred("ss2d", 2), stirred("ss3d", 2)
    general.load_state_dict({key.replace("conv2d", "conv"): value for key, value in planar.state_dict().items()})
    x = torch.randn(2, 3, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(general(x), planar(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_any_dtype_batch_and_grid_is_legal(name: str, dims: int) -> None:
    block = stirred(name, dims, dim=6)
    x = torch.randn(2, *GRIDS[dims], 6, dtype=torch.float64)
    whole = block(x)
    torch.testing.assert_close(block(x[1:]), whole[1:], rtol=1e-9, atol=1e-10)
    assert block(x[:0]).shape == (0, *x.shape[1:])
    assert torch.isfinite(block(x[(slice(None), *[slice(1)] * dims)])).all()  # a single place
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        block.to(dtype)
        found = block(x.to(dtype))
        assert found.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(found.double(), whole, rtol=1e-4, atol=1e-4)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.isfinite(block(x.float())).all()
        assert torch.isfinite(found).all()
    block.double().zero_grad()


def test_the_scan_grows_by_the_sequence_and_not_by_its_states() -> None:
    """Per token: some numbers a channel and some a state, never channels × states of them."""
    channels = states = 64
    spaces = StateSpaces(channels, states, 4, walks=1)

    def peak(steps: int) -> int:
        x = torch.randn(1, 1, channels, steps, requires_grad=True)
        return peak_memory(lambda: walk(x, spaces.walks()).sum().backward())

    grown = peak(384) - peak(256)
    assert 0 < grown < 0.25 * 128 * channels * states * 4  # the naive loop keeps gates and terms: twice this product


def test_options_change_what_they_say() -> None:
    x = torch.randn(1, 5, 5, 6, dtype=torch.float64)
    for name, option, values, tensor in (
        ("windowed", "window", (2, 3), None),
        ("atrous", "step", (2, 3), "A_logs"),
        ("s6", "kernel", (4, 3), "conv_weight"),
        ("ssd", "kernel", (4, 3), "conv1d.weight"),
        ("ssd", "head_dim", (3, 4), "D"),
        ("ss3d", "expand", (1, 2), "in_proj.weight"),
        ("umamba", "expand", (1, 2), "mamba.in_proj.weight"),
        ("multi_head", "heads", (3, 4), "mhs.y_proj.weight"),
        ("multi_head", "threshold", (0.0, 0.5), None),
    ):
        fixed = {"head_dim": 3} if name == "ssd" else {}
        found = []
        for value in values:
            torch.manual_seed(0)
            found.append(create_block(name, 6, states=2, **{**fixed, option: value}).double())
        if tensor is None:
            assert (found[0](x) - found[1](x)).abs().max() > 1e-6, option
        elif name != "multi_head":
            assert found[0].state_dict()[tensor].shape != found[1].state_dict()[tensor].shape, option
        else:
            assert any("scanhead_Z" in key for key in found[1].state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: create_block("ss2dd", 4), "create_block: unknown block 'ss2dd'; did you mean 'ss2d'"),
        (lambda: create_block("windowed", 4, windows=3), "windowed has no option 'windows'; did you mean 'window'"),
        (lambda: create_block("ss2d", 4, spatial_dims=3), "SS2D: spatial_dims must be one of 2, got 3"),
        (
            lambda: create_block("tri_oriented", 4, spatial_dims=1),
            "TriOriented: spatial_dims must be one of 2, 3, got 1",
        ),
        (lambda: create_block("atrous", 4, step=0), "AtrousScan: step must be at least 1, got step=0"),
        (lambda: create_block("umamba", 0), "UMambaStage: dim must be at least 1, got dim=0"),
        (lambda: create_block("ssd", 3, head_dim=4), "GatedSSD: head_dim=4 must divide expand·dim=6"),
        (
            lambda: create_block("multi_head", 6, heads=5),
            "GatedScan: heads must be 3 or 4 and at most dim=6, got heads=5",
        ),
    ],
)
def test_mistakes_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", list_blocks())
def test_maps_of_another_shape_are_refused_by_every_block(name: str) -> None:
    block = create_block(name, 6, states=2, **OPTIONS.get(name, {}))
    for shape in ((1, 3, 6), (1, 3, 4, 5), (1, 0, 4, 6)):
        with pytest.raises(ValueError, match=r": expected \(B Y X 6\) with sides of at least 1, got shape \(1, "):
            block(torch.zeros(shape))


@pytest.mark.compile
@pytest.mark.parametrize("name", list_blocks())
def test_blocks_compile_to_one_graph_and_export(name: str) -> None:
    block = create_block(name, 6, states=2, **OPTIONS.get(name, {})).eval()
    x = torch.randn(2, 3, 5, 6)
    expected = block(x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
    exported = torch.export.export(block, (x,), strict=False).module()
    torch.testing.assert_close(exported(x), expected, rtol=1e-5, atol=1e-5)


def test_the_benchmark_s_peer_computes_ss2d() -> None:
    from medical_seg.bench.plain import PlainSS2D

    block = stirred("ss2d", 2)
    x = torch.randn(2, 3, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(PlainSS2D(block)(x), block(x), rtol=1e-10, atol=1e-12)


def test_the_survey_counts_what_a_block_costs() -> None:
    from medical_seg.bench.state_spaces import cost

    one, four = cost("s6", 8, 4), cost("s6", 8, 8)
    assert one.parameters == four.parameters == sum(p.numel() for p in create_block("s6", 8).parameters())
    assert four.multiply_adds == 4 * one.multiply_adds > 0
    assert 3 * one.kept < four.kept < 5 * one.kept
