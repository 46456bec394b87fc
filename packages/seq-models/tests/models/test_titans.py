"""Titans: the memory against autograd and the sequential rule; the architectures against one written out."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from seq_models import create_model
from seq_models.layers.neural_memory import Memory, apply_memory, chunked_memory, fresh_memory, sequential_memory
from seq_models.models.titans import TitansConfig, TitansForCausalLM

ARCHITECTURES = ["lmm", "mac", "mag", "mal"]


def inputs(depth: int, tokens: int = 11) -> tuple[Memory, list[Tensor]]:
    torch.manual_seed(depth)
    widths = [4, *([6] * (depth - 1)), 4]
    weights = tuple(torch.randn(2, 3, i, o, dtype=torch.float64) / 2 for i, o in itertools.pairwise(widths))
    streams = [torch.randn(2, 3, tokens, 4, dtype=torch.float64) / 2 for _ in range(3)]
    gates = [scale * torch.rand(2, 3, tokens, dtype=torch.float64) for scale in (0.1, 0.2, 0.9)]
    return fresh_memory(weights), [*streams, *gates]


def by_autograd(memory: Memory, k: Tensor, v: Tensor, q: Tensor, *gates: Tensor, chunk: int) -> Tensor:
    """The paper's rule literally, for one loss after the other."""
    theta, alpha, eta = gates
    weights, surprise, out = memory.weights, memory.surprise, []
    anchor = weights
    for t in range(k.shape[2]):
        anchor = weights if t % chunk == 0 else anchor
        leaves = [w.detach().requires_grad_() for w in anchor]
        loss = (apply_memory(tuple(leaves), k[:, :, t : t + 1]) - v[:, :, t : t + 1]).square().sum()
        gradients = torch.autograd.grad(loss, leaves)
        step, decay, momentum = (gate[:, :, t, None, None] for gate in (theta, alpha, eta))
        surprise = tuple(momentum * s - step * g for s, g in zip(surprise, gradients, strict=True))
        weights = tuple((1 - decay) * w + s for w, s in zip(weights, surprise, strict=True))
        out.append(apply_memory(weights, q[:, :, t : t + 1]))
    return torch.cat(out, dim=2)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_chunks_in_parallel_equal_the_paper_s_rule_token_by_token(depth: int, chunk: int) -> None:
    memory, streams = inputs(depth)
    y, last = chunked_memory(memory, *streams, chunk=chunk)
    expected, end = sequential_memory(memory, *streams, chunk=chunk)
    literal = by_autograd(memory, *streams, chunk=chunk)
    assert (y - literal).abs().max() < 1e-10
    assert (expected - literal).abs().max() < 1e-10
    for ours, theirs in zip((*last.weights, *last.surprise), (*end.weights, *end.surprise), strict=True):
        assert (ours - theirs).abs().max() < 1e-10


def test_gradients_through_the_chunks_equal_those_through_the_sequential_rule() -> None:
    memory, streams = inputs(2)
    results = []
    for rule in (chunked_memory, sequential_memory):
        leaves = [x.clone().requires_grad_() for x in (*memory.weights, *streams)]
        start = fresh_memory(tuple(leaves[:2]))
        rule(start, *leaves[2:], chunk=4)[0].square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None
        assert (ours - theirs).abs().max() < 1e-10


def test_gradcheck_through_the_inner_gradient() -> None:
    memory, streams = inputs(2, tokens=4)
    small = [x[:1, :1].requires_grad_() for x in streams]
    start = fresh_memory(tuple(w[:1, :1] for w in memory.weights))
    assert torch.autograd.gradcheck(lambda *xs: chunked_memory(start, *xs, chunk=2)[0], small, fast_mode=True)


def test_without_momentum_and_forgetting_a_matrix_memory_is_the_delta_rule() -> None:
    memory, (k, v, q, theta, _, _) = inputs(1)
    zero = torch.zeros_like(theta)
    y, _ = chunked_memory(memory, k, v, q, theta, zero, zero, chunk=1)
    w, out = memory.weights[0], []
    for t in range(k.shape[2]):
        key, beta = k[:, :, t, :, None], 2 * theta[:, :, t, None, None]
        w = w - beta * key @ (key.mT @ w - v[:, :, t, None])
        out.append(q[:, :, t, None] @ w)
    assert (y - torch.cat(out, dim=2)).abs().max() < 1e-10


@pytest.mark.parametrize("split", [1, 3, 4, 10])
def test_a_split_sequence_gives_the_same_memory(split: int) -> None:
    memory, streams = inputs(2)
    whole, last = chunked_memory(memory, *streams, chunk=4)
    first, between = chunked_memory(memory, *(x[:, :, :split] for x in streams), chunk=4)
    rest, end = chunked_memory(between, *(x[:, :, split:] for x in streams), chunk=4, start=split)
    assert (torch.cat([first, rest], dim=2) - whole).abs().max() < 1e-10
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(end.weights, last.weights, strict=True))


def test_gates_of_zero_and_one_give_finite_outputs_and_gradients() -> None:
    memory, (k, v, q, theta, alpha, eta) = inputs(2)
    alpha = torch.ones_like(alpha).requires_grad_()
    eta = torch.zeros_like(eta).requires_grad_()
    y, _ = chunked_memory(memory, k, v, q, theta, alpha, eta, chunk=4)
    expected, _ = sequential_memory(memory, k, v, q, theta, alpha, eta, chunk=4)
    assert (y - expected).abs().max() < 1e-10
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(y.sum(), (alpha, eta)))


def test_chunk_of_zero_is_an_error() -> None:
    memory, streams = inputs(1)
    with pytest.raises(ValueError, match="chunked_memory: chunk must be at least 1, got chunk=0"):
        chunked_memory(memory, *streams, chunk=0)


def small(architecture: str, **options: Any) -> TitansForCausalLM:
    torch.manual_seed(0)
    model = create_model(f"test_titans_{architecture}", **options)
    assert isinstance(model, TitansForCausalLM)
    return model.double().eval()


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


def test_state_does_not_grow_beyond_one_window(architecture: str) -> None:
    model = small(architecture)
    with torch.no_grad():
        sizes = [model(torch.randint(256, (1, n)), use_cache=True).past_key_values.nbytes() for n in (8, 12, 24)]
    assert len(set(sizes)) == 1


def test_a_memory_starts_with_maps_that_keep_length_and_gates_that_keep_memories() -> None:
    torch.manual_seed(0)
    model: Any = create_model("test_titans_lmm", hidden_size=128, memory_depth=2, memory_expansion=2)
    memory = model.model.layers[0]
    for weight in memory.memory.start:
        assert float(weight.detach().std()) == pytest.approx(weight.shape[1] ** -0.5, rel=0.03)
    theta, alpha, eta = torch.sigmoid(memory.memory.gates.bias.detach()).view(3, -1).mean(1).tolist()
    assert (theta, alpha, eta) == pytest.approx((0.1, 0.018, 0.9), abs=2e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chunk_size": 0}, "TitansConfig: chunk_size must be at least 1, got chunk_size=0"),
        ({"num_persistent": -1}, "num_persistent must not be negative"),
        ({"theta_max": -0.1}, "theta_max must be finite and not negative"),
        ({"hidden_size": 33}, "hidden_size must be a multiple of num_attention_heads=4"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TitansConfig(**options)


def test_a_memory_without_persistent_tokens_works(architecture: str) -> None:
    model = small(architecture, num_persistent=0)
    with torch.no_grad():
        assert bool(model(torch.randint(256, (1, 7))).logits.isfinite().all())


def test_bfloat16_keeps_the_memory_in_float32(architecture: str) -> None:
    model, ids = small(architecture).bfloat16(), torch.randint(256, (1, 9))
    with torch.no_grad():
        output = model(ids, use_cache=True)
    assert output.logits.dtype == torch.bfloat16
    memory = output.past_key_values.groups[0].state[0][0]
    memory = memory if isinstance(memory, Memory) else memory[0]
    assert memory.weights[0].dtype == torch.float32
    assert bool(output.logits.isfinite().all())


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


class WrittenOutMemory:
    """The memory token by token: convolutions over lists, gradients by autograd, one gate after the other."""

    def __init__(self, p: dict[str, Tensor], settings: TitansConfig) -> None:
        self.p, self.settings, self.heads = p, settings, settings.num_attention_heads
        self.weights = [p[f"start_{number}"] for number in range(settings.memory_depth)]
        self.surprise = [torch.zeros_like(w) for w in self.weights]
        self.anchor, self.count = self.weights, 0
        self.inputs: dict[str, list[Tensor]] = {}

    def convolved(self, stream: str, name: str, x: Tensor) -> Tensor:
        """SiLU of the convolution of one more projected token, by heads."""
        seen = self.inputs.setdefault(stream, [])
        seen.append(self.p[f"{name}.weight"] @ x)
        taps = self.p[f"{name}_conv.weight"][:, 0]
        recent = seen[-taps.shape[1] :]
        y = torch.stack([taps[:, -1 - back] * recent[-1 - back] for back in range(len(recent))]).sum(0)
        return (y / (1 + torch.exp(-y))).view(-1, self.heads, len(x) // self.heads)

    @staticmethod
    def apply(weights: list[Tensor], x: Tensor) -> Tensor:
        for number, weight in enumerate(weights):
            if number:
                x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
            x = (x[:, None] @ weight)[:, 0]
        return x

    def query(self, stream: str, x: Tensor) -> Tensor:
        q = self.convolved(stream, "query", x)[0]
        return q / q.norm(dim=-1, keepdim=True)

    def step(self, x: Tensor) -> Tensor:
        """Store a token, then read it."""
        s = self.settings
        k, v = self.convolved("kv", "key_value", x)
        k = k / k.norm(dim=-1, keepdim=True)
        theta, alpha, eta = torch.sigmoid(self.p["gates.weight"] @ x + self.p["gates.bias"]).view(3, self.heads, 1, 1)
        if self.count % s.chunk_size == 0:
            self.anchor = self.weights
        self.count += 1
        with torch.enable_grad():
            leaves = [w.detach().requires_grad_() for w in self.anchor]
            gradients = torch.autograd.grad((self.apply(leaves, k) - v).square().sum(), leaves)
        self.surprise = [eta * o - theta * s.theta_max * g for o, g in zip(self.surprise, gradients, strict=True)]
        self.weights = [(1 - alpha) * w + o for w, o in zip(self.weights, self.surprise, strict=True)]
        return self.apply(self.weights, self.query("q", x)).flatten()


def attended(
    p: dict[str, Tensor], heads: int, x: Tensor, fixed: list[Tensor], keys: list[tuple[int, Tensor]]
) -> Tensor:
    """One query; keys are (distance, token), fixed ones stand at no distance."""
    width = len(x)
    weight = p["attention.qkv.weight"]
    tokens = torch.stack([*fixed, *(token for _, token in keys)])
    distance = torch.tensor([0] * len(fixed) + [d for d, _ in keys]).double()
    q = (weight[:width] @ x).view(heads, -1)
    k, v = ((tokens @ weight[part * width : (part + 1) * width].T).view(len(tokens), heads, -1) for part in (1, 2))
    slope = torch.tensor([2.0 ** (-8 * (head + 1) / heads) for head in range(heads)]).double()
    scores = torch.einsum("hd,mhd->hm", q, k) / (width // heads) ** 0.5 - slope[:, None] * distance
    return torch.einsum("hm,mhd->hd", scores.softmax(-1), v).flatten()


def mixed(p: dict[str, Tensor], x: Tensor, settings: TitansConfig) -> Tensor:
    """What the mixer of a layer makes of the normed tokens (N, C)."""
    kind, heads = settings.architecture, settings.num_attention_heads
    memory = WrittenOutMemory({k.removeprefix("memory."): v for k, v in p.items() if k.startswith("memory.")}, settings)
    fixed = list(p["persistent"])
    rows, seen, segment = [], [], []
    before = [] if kind == "mac" else [memory.step(token) for token in fixed]
    start = memory.weights
    for t, token in enumerate(x):
        if kind == "mac":
            if t % settings.chunk_size == 0:
                segment, start = [], memory.weights
            segment += [(t, memory.apply(start, memory.query("read", token)).flatten()), (t, token)]
            y = attended(p, heads, token, fixed, [(t - at, key) for at, key in segment])
            m = memory.step(y)
        else:
            m = memory.step(token)
            seen.append(m if kind == "mal" else token)
            first = max(0, t - settings.window + 1)
            keys = [(t - at, seen[at]) for at in range(first, t + 1)]
            if kind == "lmm":
                y = p["gate.weight"] @ token
            else:
                y = attended(p, heads, seen[-1], before if kind == "mal" else fixed, keys)
        if kind == "mal":
            rows.append(y)
        else:
            rows.append(rms(m, p["memory_norm.weight"]) * torch.sigmoid(rms(y, p["gate_norm.weight"])))
    return torch.stack(rows)


@torch.no_grad()
def test_the_whole_network_equals_one_written_out(architecture: str) -> None:
    """Token by token, from the parameters alone: no layer of the package, no operator of the core."""
    model = small(architecture)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    state = model.state_dict()
    settings: Any = model.config
    ids = torch.randint(256, (11,))
    x = state["model.embed_tokens.weight"][ids]
    for layer in range(settings.num_hidden_layers):
        p = {k.removeprefix(f"model.layers.{layer}."): v for k, v in state.items() if f".layers.{layer}." in k}
        x = x + mixed(p, rms(x, p["mixer_norm.weight"]), settings) @ p["out.weight"].T
        gate, value = (rms(x, p["mlp_norm.weight"]) @ p["up.weight"].T).chunk(2, -1)
        x = x + (gate * torch.sigmoid(gate) * value) @ p["down.weight"].T
    expected = rms(x, state["model.norm.weight"]) @ state["model.embed_tokens.weight"].T
    assert (model(ids[None]).logits[0] - expected).abs().max() < 1e-10 * expected.abs().max()
