"""Titans' long-term memory: a small network whose weights are learned while it reads, one gradient step a token.

Paper: Behrouz, Zhong, Mirrokni, Titans: Learning to Memorize at Test Time, arXiv 2501.00663. The authors released no
code; lucidrains/titans-pytorch is the usual substitute, see `seq_models.layers.titans_lucidrains`.

S_t = η_t S_{t−1} − θ_t ∇ℓ(M_a; x_t),  M_t = (1 − α_t) M_{t−1} + S_t,  y_t = M_t(q_t),  ℓ = ‖M(k_t) − v_t‖² (a sum);
a is the start of the chunk of token t. The gradient of a layer is a product xᵀδ of what goes in and what comes back, so
inside a chunk no weights but the first are ever formed: with D_α, D_η the triangles of products of 1 − α and of η,

    M_t = B_t M_0 + c_t S_0 − Σ_{i≤t} (D_α D_η)_{ti} x_iᵀ δ_i,

and reading it is a masked product of attention's shape, in each layer of a deep memory.
Numbers are checked in ``test_titans.py``: against the sequential rule, whose gradients autograd takes.

Shapes: keys, values, queries (B, H, N, D), gates (B, H, N).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

SMALLEST = 1e-38  # of a decay, so that its logarithm is finite

Weights = tuple[Float[Tensor, "B H I O"], ...]


class Memory(NamedTuple):
    """What is carried along a sequence; of constant size.

    Attributes:
        anchor: weights at the start of the current chunk, where gradients are taken.
        weights: M_t, layer by layer.
        surprise: S_t.
    """

    anchor: Weights
    weights: Weights
    surprise: Weights


def fresh_memory(weights: Weights) -> Memory:
    """A memory that has read nothing."""
    return Memory(weights, weights, tuple(torch.zeros_like(w) for w in weights))


def apply_memory(weights: Weights, x: Float[Tensor, "B H N D"]) -> Float[Tensor, "B H N D"]:
    """M(x): linear layers with GELU between them."""
    for number, weight in enumerate(weights):
        x = (x if number == 0 else F.gelu(x)) @ weight
    return x


def gelu_slope(x: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Derivative of GELU: Φ(x) + xφ(x)."""
    return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x * x) * 0.3989422804014327


def forward_trace(weights: Weights, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs of the linear layers."""
    inputs, outputs = [], []
    for number, weight in enumerate(weights):
        inputs.append(x if number == 0 else F.gelu(outputs[-1]))
        outputs.append(inputs[-1] @ weight)
    return inputs, outputs


def backward_trace(weights: Weights, outputs: list[Tensor], delta: Tensor) -> list[Tensor]:
    """What comes back to each linear layer's output, given what comes back to the last one."""
    deltas = [delta]
    for number in range(len(weights) - 1, 0, -1):
        deltas.append((deltas[-1] @ weights[number].mT) * gelu_slope(outputs[number - 1]))
    return deltas[::-1]


def _gradient_factors(
    weights: Weights, keys: Tensor, values: Tensor, theta: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """x and δ of every layer and token: θ∇ℓ of a token is xᵀδ."""
    inputs, outputs = forward_trace(weights, keys)
    delta = (2 * theta)[..., None] * (outputs[-1] - values)
    return inputs, backward_trace(weights, outputs, delta)


def _decays(gate: Float[Tensor, "B H N"]) -> tuple[Float[Tensor, "B H N N"], Float[Tensor, "B H N"]]:
    """Products of the gates behind s up to t as (t, s), 0 above the diagonal; products up to t."""
    log = gate.clamp_min(SMALLEST).log().cumsum(-1)
    difference = log[..., :, None] - log[..., None, :]
    upper = torch.ones(difference.shape[-2:], dtype=torch.bool, device=gate.device).triu(1)
    return difference.masked_fill(upper, -torch.inf).exp(), log.exp()


def read_chunk(
    memory: Memory,
    keys: Float[Tensor, "B H N D"],
    values: Float[Tensor, "B H N D"],
    queries: Float[Tensor, "B H N D"],
    theta: Float[Tensor, "B H N"],
    alpha: Float[Tensor, "B H N"],
    eta: Float[Tensor, "B H N"],
) -> tuple[Float[Tensor, "B H N D"], Memory]:
    """y and the memory behind tokens of one chunk, or of a part of it; the anchor stays."""
    inputs, deltas = _gradient_factors(memory.anchor, keys, values, theta)
    forget, kept = _decays(1 - alpha)
    momentum, carried = _decays(eta)
    share = forget @ momentum
    old = (forget @ carried[..., None]).squeeze(-1)
    y, weights, surprise = queries, [], []
    for number, (x, delta) in enumerate(zip(inputs, deltas, strict=True)):
        before, last = memory.weights[number], memory.surprise[number]
        y = y if number == 0 else F.gelu(y)
        y = kept[..., None] * (y @ before) + old[..., None] * (y @ last) - ((y @ x.mT) * share) @ delta
        end = (..., -1, slice(None), None)
        scale, drift = kept[..., -1, None, None], old[..., -1, None, None]
        weights.append(scale * before + drift * last - x.mT @ (share[end] * delta))
        surprise.append(carried[..., -1, None, None] * last - x.mT @ (momentum[end] * delta))
    return y, Memory(memory.anchor, tuple(weights), tuple(surprise))


def chunked_memory(
    memory: Memory,
    keys: Float[Tensor, "B H N D"],
    values: Float[Tensor, "B H N D"],
    queries: Float[Tensor, "B H N D"],
    theta: Float[Tensor, "B H N"],
    alpha: Float[Tensor, "B H N"],
    eta: Float[Tensor, "B H N"],
    *,
    chunk: int,
    start: int = 0,
) -> tuple[Float[Tensor, "B H N D"], Memory]:
    """y of tokens start, start + 1, … and the memory behind them; chunks begin at multiples of ``chunk``.

    Inside a chunk all tokens at once, chunk after chunk. Any split of a sequence gives the same as the whole.

    Raises:
        ValueError: ``chunk`` below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunked_memory: chunk must be at least 1, got chunk={chunk}")
    tokens, done, parts = keys.shape[2], 0, []
    while done < tokens:
        phase = (start + done) % chunk
        if phase == 0:
            memory = memory._replace(anchor=memory.weights)
        part = slice(done, min(tokens, done + chunk - phase))
        y, memory = read_chunk(memory, *(x[:, :, part] for x in (keys, values, queries, theta, alpha, eta)))
        parts.append(y)
        done = part.stop
    return torch.cat(parts, dim=2) if parts else queries, memory


def sequential_memory(
    memory: Memory,
    keys: Float[Tensor, "B H N D"],
    values: Float[Tensor, "B H N D"],
    queries: Float[Tensor, "B H N D"],
    theta: Float[Tensor, "B H N"],
    alpha: Float[Tensor, "B H N"],
    eta: Float[Tensor, "B H N"],
    *,
    chunk: int,
    start: int = 0,
) -> tuple[Float[Tensor, "B H N D"], Memory]:
    """The same, one token after the other with explicit weights: what `chunked_memory` is compared with."""
    parts = []
    for t in range(keys.shape[2]):
        if (start + t) % chunk == 0:
            memory = memory._replace(anchor=memory.weights)
        now = slice(t, t + 1)
        inputs, deltas = _gradient_factors(memory.anchor, keys[:, :, now], values[:, :, now], theta[:, :, now])
        a, e = alpha[:, :, now, None], eta[:, :, now, None]
        surprise = tuple(e * s - x.mT @ d for s, x, d in zip(memory.surprise, inputs, deltas, strict=True))
        weights = tuple((1 - a) * w + s for w, s in zip(memory.weights, surprise, strict=True))
        memory = Memory(memory.anchor, weights, surprise)
        parts.append(apply_memory(weights, queries[:, :, now]))
    return torch.cat(parts, dim=2), memory
