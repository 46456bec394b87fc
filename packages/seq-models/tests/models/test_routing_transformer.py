"""The Routing Transformer: equality with the peer, the leak of the published selection, the causal one, centroids."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from attn_core.testing import TOLERANCE
from seq_models.models.routing_transformer import (
    VARIANTS,
    Centroids,
    RoutingAttention,
    RoutingConfig,
    RoutingForCausalLM,
    causal_routed_attention,
    routed_attention,
)


def peer() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peer's own dependencies
        from routing_transformer import routing_transformer  # pyright: ignore[reportMissingImports]
    return routing_transformer


def config(**options: Any) -> RoutingConfig:
    return RoutingConfig(**{**VARIANTS["test_routing"], **options})


def tokens(batch: int = 2, length: int = 24) -> Tensor:
    return torch.randint(0, 256, (batch, length))


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of q and k whose rotation pairs channels i and i + D/2, as rows that pair 2i and 2i + 1."""
    shape = weight.shape
    per_head = weight.view(heads, 2, -1, *shape[1:]).transpose(1, 2)
    return per_head.reshape(shape)


@pytest.mark.parity
@pytest.mark.parametrize(("window", "local", "length"), [(4, 0, 24), (6, 1, 24), (12, 2, 24), (24, 1, 24)])
def test_attention_equals_the_peer(window: int, local: int, length: int) -> None:
    theirs = peer()
    dim, heads = 16, 4
    clusters = length // window
    other = theirs.SelfAttention(
        dim, 1, length, heads, local, window, causal=True, shared_qk=True, local_attn_window_size=6
    ).double()
    ours = RoutingAttention(
        config(
            hidden_size=dim, num_attention_heads=heads, num_local_heads=local, num_clusters=clusters, window=window,
            local_block=6, style="lucidrains", selection="topk",
        ),
        layer=0,
    ).double()  # fmt: skip
    state = {"to_q.weight": other.to_q.weight, "to_v.weight": other.to_v.weight, "to_out.weight": other.to_out.weight}
    if local:
        weight, bias = other.local_to_qkv.weight.detach(), other.local_to_qkv.bias.detach()
        parts = [torch.cat([interleaved(t, local) for t in x.chunk(3)[:2]] + [x.chunk(3)[2]]) for x in (weight, bias)]
        state |= {"local_to_qkv.weight": parts[0], "local_to_qkv.bias": parts[1]}
    if heads > local:
        means = torch.nn.functional.normalize(torch.randn(heads - local, clusters, dim // heads).double(), dim=-1)
        other.global_attn.kmeans.means.copy_(means)
        other.global_attn.kmeans.initted.fill_(True)
        state |= {
            "centroids.means": means, "centroids.started": torch.tensor(True),
            "centroids.count": torch.ones(heads - local, clusters).double(),
        }  # fmt: skip
    ours.load_state_dict(state)
    x = torch.randn(2, length, dim).double().requires_grad_()
    y = x.detach().clone().requires_grad_()
    position = theirs.FixedPositionalEmbedding(dim // heads, length).double()
    # float64 angles: the peer's buffer is float32
    inverse = 10000 ** (-torch.arange(0, dim // heads, 2).double() / (dim // heads))
    angle = torch.arange(length).double()[:, None] * inverse
    position.emb.data = torch.cat([angle.sin(), angle.cos()], -1)
    if local:
        other.local_attn.rel_pos.inv_freq = inverse
    a, loss_a = other(x, pos_emb=position(x))
    b, _, loss_b = ours(y)
    assert (a - b).abs().max() < 1e-10
    if heads > local:
        assert loss_b is not None
        assert abs(float(loss_a.detach() - loss_b.detach())) < 1e-12
        other.global_attn.kmeans.update()
        torch.testing.assert_close(other.global_attn.kmeans.means, ours.centroids.means, rtol=0, atol=1e-10)
    probe = torch.randn_like(a)
    (a * probe).sum().backward()
    (b * probe).sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert (x.grad - y.grad).abs().max() < 1e-10


def test_published_selection_leaks_the_future_and_the_causal_one_does_not() -> None:
    """Another last quarter changes past outputs under top-k; never under the causal selection."""
    ids = tokens(1, 32)
    edited = ids.clone()
    edited[:, 24:] = (edited[:, 24:] + 7) % 256
    changed = {}
    for selection in ("topk", "causal"):
        torch.manual_seed(0)
        model = RoutingForCausalLM(config(selection=selection)).double().eval()
        with torch.no_grad():
            difference = (model(ids).logits - model(edited).logits)[:, :24].abs().amax(-1)
        changed[selection] = int((difference > 1e-10).sum())
    assert changed["topk"] > 0
    assert changed["causal"] == 0


def test_one_cluster_that_holds_everything_is_full_attention() -> None:
    q, v = torch.randn(2, 3, 10, 4).double(), torch.randn(2, 3, 10, 4).double()
    full = torch.nn.functional.scaled_dot_product_attention(q, q, v, is_causal=True, scale=1.0)
    published = routed_attention(q, q, v, torch.randn(2, 3, 10, 1).double(), 10, scale=1.0)
    causal, _ = causal_routed_attention(q, q, v, torch.zeros(2, 3, 10, dtype=torch.long), 1, 10, scale=1.0)
    torch.testing.assert_close(published, full, rtol=0, atol=TOLERANCE[torch.float64])
    torch.testing.assert_close(causal, full, rtol=0, atol=TOLERANCE[torch.float64])


def test_official_results_are_shared_by_count_plus_a_hundredth() -> None:
    """A token in one cluster is divided by 1.01, one in none gets zeros."""
    q, v = torch.randn(1, 1, 6, 4).double(), torch.randn(1, 1, 6, 4).double()
    scores = torch.full((1, 1, 6, 2), -9.0).double()
    scores[0, 0, :3, 0] = 1.0
    scores[0, 0, 1:4, 1] = 1.0
    out = routed_attention(q, q, v, scores, 3, scale=1.0, eps=1e-2)[0, 0]
    plain = []
    for members in ([0, 1, 2], [1, 2, 3]):
        x = q[0, 0, members]
        mask = torch.ones(3, 3).tril().bool()
        plain.append((x @ x.T).masked_fill(~mask, -torch.inf).softmax(-1) @ v[0, 0, members])
    torch.testing.assert_close(out[0], plain[0][0] / 1.01, rtol=0, atol=1e-12)
    torch.testing.assert_close(out[1], (plain[0][1] + plain[1][0]) / 2.01, rtol=0, atol=1e-12)
    torch.testing.assert_close(out[3], plain[1][2] / 1.01, rtol=0, atol=1e-12)
    assert out[4:].abs().max() == 0


@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_causal_selection_equals_a_loop_over_tokens(window: int) -> None:
    torch.manual_seed(window)
    B, H, N, D, K = 2, 2, 17, 4, 3
    q, v = torch.randn(B, H, N, D).double(), torch.randn(B, H, N, D).double()
    nearest = torch.randint(0, K, (B, H, N))
    out, _ = causal_routed_attention(q, q, v, nearest, K, window, scale=0.5)
    for b in range(B):
        for h in range(H):
            members: dict[int, list[int]] = {}
            for t in range(N):
                mine = members.setdefault(int(nearest[b, h, t]), [])
                mine.append(t)
                seen = mine[max(0, ((len(mine) - 1) // window - 1) * window) :]
                weight = (0.5 * q[b, h, seen] @ q[b, h, t]).softmax(0)
                torch.testing.assert_close(out[b, h, t], weight @ v[b, h, seen], rtol=0, atol=1e-12)


def test_centroids_without_members_stay_and_others_follow_the_official_average() -> None:
    centroids = Centroids(1, 3, 4, decay=0.9, style="official")
    centroids.reset_parameters()
    before = centroids.means.clone()
    points = torch.randn(2, 1, 5, 4)
    nearest = torch.tensor([[[0, 0, 1, 1, 1]], [[0, 1, 1, 0, 0]]])
    centroids.update(points, nearest)
    assert torch.equal(centroids.means[0, 2], before[0, 2])
    first = points.flatten(0, 2)[(nearest == 0).flatten()]
    expected = (0.9 * before[0, 0] + 0.1 * first.sum(0)) / (0.9 + 0.1 * len(first))
    torch.testing.assert_close(centroids.means[0, 0], expected)


def test_unit_centroids_start_by_ten_lloyd_steps_and_move_towards_unit_means() -> None:
    centroids = Centroids(1, 3, 4, decay=0.9, style="lucidrains").double().train()
    centroids.reset_parameters()
    points = torch.randn(2, 1, 20, 4).double()
    points = points / points.norm(dim=-1, keepdim=True)
    flat = points.flatten(0, 2)
    torch.manual_seed(3)
    scores = centroids(points)
    torch.manual_seed(3)
    means = flat[torch.randperm(40)[:3]]
    for _ in range(10):
        nearest = (flat @ means.T).argmax(1)
        sums = torch.stack([flat[nearest == k].sum(0) for k in range(3)])
        means = sums / sums.norm(dim=1, keepdim=True)
    torch.testing.assert_close(centroids.means[0], means, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(scores.flatten(0, 2), flat @ means.T, rtol=1e-10, atol=1e-12)
    nearest = torch.randint(0, 2, (2, 1, 20))
    centroids.update(points, nearest)
    sums = torch.stack([flat[nearest.flatten() == k].sum(0) for k in range(2)])
    expected = torch.cat([0.9 * means[:2] + 0.1 * sums / sums.norm(dim=1, keepdim=True), means[2:]])
    torch.testing.assert_close(centroids.means[0], expected, rtol=1e-10, atol=1e-12)


def test_processes_move_centroids_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Members and sums are added over processes before the average: each ends where one process with all rows does."""
    points, nearest = torch.randn(2, 2, 7, 4), torch.randint(0, 3, (2, 2, 7))

    def fresh() -> Centroids:
        torch.manual_seed(0)
        centroids = Centroids(2, 3, 4, decay=0.9, style="official")
        centroids.reset_parameters()
        return centroids

    alone, ours = fresh(), fresh()
    alone.update(points, nearest)
    others = list(fresh()._gathered(points[1:], nearest[1:]))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.add_(others.pop(0)))
    ours.update(points[:1], nearest[:1])
    assert not others
    torch.testing.assert_close(ours.means, alone.means)


def test_centroids_move_once_a_step_under_gradient_checkpointing() -> None:
    means = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = RoutingForCausalLM(config()).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        ids = tokens()
        out = model(ids, labels=ids)
        out.loss.backward()
        assert out.auxiliary_loss > 0
        means.append(model.get_buffer("model.layers.0.attention.centroids.means").clone())
    torch.testing.assert_close(means[0], means[1])
    fresh = torch.nn.functional.layer_norm(means[0], means[0].shape[-1:])
    assert not torch.allclose(means[0], fresh)


def test_random_selection_ignores_the_content_of_tokens() -> None:
    model = RoutingForCausalLM(config(selection="random", num_local_heads=0)).eval()
    ids = tokens()
    torch.manual_seed(1)
    first = model(ids).logits
    torch.manual_seed(1)
    again = model(ids).logits
    torch.manual_seed(2)
    other = model(ids).logits
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("selection", ["topk", "random"])
def test_generation_asks_for_the_causal_selection(selection: str) -> None:
    model = RoutingForCausalLM(config(selection=selection)).eval()
    with pytest.raises(ValueError, match=r"selection='\w+' chooses among all tokens and has no state.*to generate"):
        model(tokens(), use_cache=True)
    model.config.selection = "causal"
    assert model(tokens(), use_cache=True).past_key_values.get_seq_length() == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "RoutingConfig: window must be at least 1, got window=0"),
        ({"num_local_heads": 5}, "num_local_heads must be in 0…num_attention_heads=4"),
        ({"ema_decay": 1.0}, "ema_decay must be at least 0 and below 1"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_layers_before_the_first_routing_layer_have_local_heads_only() -> None:
    model: Any = RoutingForCausalLM(config(first_routing_layer=1))
    assert [layer.attention.routing_heads for layer in model.model.layers] == [0, 2]
    assert {RoutingConfig(**VARIANTS["routing_pg19"]).local_heads(i) for i in range(21)} == {8}


def turned(x: Tensor) -> Tensor:
    """Rotary embedding by complex numbers; x (H, N, D)."""
    n, width = x.shape[1:]
    angle = torch.arange(n).double()[:, None] * 10000.0 ** (-torch.arange(0, width, 2).double() / width)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def normed(x: Tensor, eps: float = 1e-5) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def plain(state: dict[str, Tensor], ids: Tensor, settings: RoutingConfig) -> tuple[Tensor, Tensor]:
    """Logits of one row and the commitment loss, written out token by token: no layer of the package, no operator."""
    width, n, local = settings.head_dim, len(ids), settings.num_local_heads
    official = settings.style == "official"
    table = state["model.embed_tokens.weight"]
    x, commitment = table[ids], torch.zeros(()).double()
    for layer in range(settings.num_hidden_layers):
        p = {k.removeprefix(f"model.layers.{layer}."): v for k, v in state.items() if f".layers.{layer}." in k}
        y = normed(x) * p["attention_norm.weight"] + p["attention_norm.bias"]
        qkv = y @ p["attention.local_to_qkv.weight"].T + p.get("attention.local_to_qkv.bias", 0.0)
        q, k, v = qkv.view(n, 3, local, width).permute(1, 2, 0, 3)
        q, k = turned(q), turned(k)
        parts = []
        for i in range(n):
            seen = list(range(max(0, i // settings.local_block - 1) * settings.local_block, i + 1))
            weight = (torch.einsum("hd,hmd->hm", q[:, i], k[:, seen]) / width**0.5).softmax(-1)
            parts.append(torch.einsum("hm,hmd->hd", weight, v[:, seen]))
        q, v = ((y @ p[f"attention.to_{t}.weight"].T).view(n, -1, width).transpose(0, 1) for t in "qv")
        if official:
            points = normed(q, 1e-6)
            q, scale = turned(points), 1.0
            k = q
        else:
            q, v, scale = turned(q), turned(v), width**-0.5
            points = k = q / q.norm(dim=-1, keepdim=True)
        means = p["attention.centroids.means"]
        nearest = (points @ means.mT).argmax(-1)
        chosen = torch.stack([m[i] for m, i in zip(means, nearest, strict=True)])
        commitment += (2 if official else 1) * settings.commitment * (points - chosen).square().mean()
        routed = torch.zeros_like(v)
        for h in range(len(v)):
            members: dict[int, list[int]] = {}
            for t in range(n):
                mine = members.setdefault(int(nearest[h, t]), [])
                mine.append(t)
                seen = mine[max(0, ((len(mine) - 1) // settings.window - 1) * settings.window) :]
                logits = scale * k[h, seen] @ q[h, t]
                if not official:
                    logits[-1] = -5e4
                routed[h, t] = logits.softmax(0) @ v[h, seen]
        out = torch.cat([torch.stack(parts, 1), routed])
        if official:
            out = out @ p["attention.heads_talk.weight"].T
        x = x + out.transpose(0, 1).reshape(n, -1) @ p["attention.to_out.weight"].T
        y = normed(x) * p["feedforward_norm.weight"] + p["feedforward_norm.bias"]
        inner = y @ p["feedforward.w1.weight"].T + p.get("feedforward.w1.bias", 0.0)
        if official:
            smooth = torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3))
            inner = 0.5 * inner * (1 + smooth) * (y @ p["feedforward.gate.weight"].T)
        else:
            inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
        x = x + inner @ p["feedforward.w2.weight"].T + p.get("feedforward.w2.bias", 0.0)
    return (normed(x) * state["model.norm.weight"] + state["model.norm.bias"]) @ table.T, commitment


@pytest.mark.parametrize("name", ["test_routing", "test_routing_lucidrains"])
@torch.no_grad()
def test_the_whole_network_equals_one_written_out(name: str) -> None:
    settings = RoutingConfig(**{**VARIANTS[name], "commitment": 0.5})
    model: Any = RoutingForCausalLM(settings).double()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.1))
    for layer in model.model.layers:
        layer.attention.centroids.started.fill_(value=True)
    ids = torch.randint(0, 256, (17,))
    logits, commitment = plain(model.state_dict(), ids, settings)
    assert (model.eval()(ids[None]).logits[0] - logits).abs().max() < 1e-10
    state = model(ids[None, :9], use_cache=True).past_key_values
    assert (model(ids[None, 9:], past_key_values=state).logits[0] - logits[9:]).abs().max() < 1e-10
    trained = model.train()(ids[None], labels=ids[None])
    assert abs(trained.auxiliary_loss - commitment) < 1e-10
    cross = torch.nn.functional.cross_entropy(logits[:-1], ids[1:])
    assert abs(trained.loss - cross - commitment) < 1e-10


@pytest.mark.parametrize("style", ["official", "lucidrains"])
def test_fresh_centroids_lie_where_points_lie(style: str) -> None:
    centroids = Centroids(2, 5, 6, decay=0.9, style=style)
    centroids.reset_parameters()
    length = 6**0.5 if style == "official" else 1.0
    torch.testing.assert_close(centroids.means.norm(dim=-1), torch.full((2, 5), length), rtol=1e-4, atol=0)


def test_a_smaller_decay_moves_centroids_further() -> None:
    moved = []
    for decay in (0.999, 0.5):
        torch.manual_seed(0)
        model: Any = RoutingForCausalLM(config(ema_decay=decay)).train()
        means = model.model.layers[0].attention.centroids.means
        before = means.clone()
        torch.manual_seed(1)
        model(tokens())
        moved.append(float((means - before).norm()))
    assert 0 < moved[0] < 0.1 * moved[1]
