"""The neural memory as lucidrains/titans-pytorch computes it (``titans_pytorch/neural_memory.py``), with its keys.

Differs from the paper, and from `seq_models.layers.neural_memory`: gates of forgetting and momentum for whole chunks,
from their mean; the loss is a mean over channels; no convolutions, RMSNorm instead; the memory is LN(MLP(k))·(γ + 1) +
k; token t reads what ⌊(t + 1)/chunk⌋ whole chunks have left; and with ``batch_size=None`` every gradient of a sequence
is taken at the learned weights, so that no chunk sees what earlier ones have stored. ``batch_size=chunk_size`` takes
them at the start of each chunk, as the paper does. Differs from the original: weights of heads are parameters of their
own memory (there, views of one, which no optimizer can update on a CPU), and its unused copies of them are left out;
gradients are products written out, not vmapped. Numbers are checked in ``test_titans_lucidrains.py`` against the
installed original.

Shapes: x (B, N, C) → (B, N, C).
"""

import itertools
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from attn_core import linear_scan
from attn_core.nn import Linear
from seq_models.layers.neural_memory import backward_trace, forward_trace


class LucidrainsMemory(nn.Module):
    """NeuralMemory of titans-pytorch.

    Args:
        dim: channels C.
        heads, head_dim: of the memories; one head is as wide as ``dim``.
        chunk_size: tokens of an update.
        batch_size: tokens after which gradients are taken at the newest weights, a multiple of ``chunk_size``; None:
            never.
        depth, expansion: linear layers of a memory, and their inner width over ``head_dim``.
        momentum: whether surprises add up.
        max_step: largest learning rate.
        qk_norm: RMSNorm of queries and keys, with a gain for each head.

    Raises: ValueError if sizes do not fit.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 1,
        head_dim: int | None = None,
        chunk_size: int = 1,
        batch_size: int | None = None,
        depth: int = 2,
        expansion: float = 4.0,
        momentum: bool = True,
        max_step: float = 1.0,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        head_dim = dim if head_dim is None else head_dim
        for name, value in (("dim", dim), ("heads", heads), ("chunk_size", chunk_size), ("depth", depth)):
            if value < 1:
                raise ValueError(f"LucidrainsMemory: {name} must be at least 1, got {name}={value}")
        if heads == 1 and head_dim != dim:
            raise ValueError(f"LucidrainsMemory: one head is as wide as dim={dim}, got head_dim={head_dim}")
        if batch_size is not None and (batch_size < 1 or batch_size % chunk_size):
            raise ValueError(
                f"LucidrainsMemory: batch_size must be a multiple of chunk_size={chunk_size}, got {batch_size}"
            )
        self.heads, self.chunk, self.batch_size, self.max_step = heads, chunk_size, batch_size, max_step
        inner, hidden = heads * head_dim, int(head_dim * expansion)
        widths = [head_dim, *([hidden] * (depth - 1)), head_dim]
        self.store_norm, self.retrieve_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.q_gain, self.k_gain = (
            nn.Parameter(torch.zeros(heads, 1, head_dim)) if qk_norm else None for _ in range(2)
        )
        self.gain = nn.Parameter(torch.zeros(heads, head_dim))
        self.weights = nn.ParameterList(
            [
                nn.Parameter(torch.stack([nn.init.xavier_uniform_(torch.empty(i, o)) for _ in range(heads)]))
                for i, o in itertools.pairwise(widths)
            ]
        )
        self.to_queries, self.to_keys, self.to_values = (Linear(dim, inner, bias=False) for _ in range(3))
        self.to_step, self.to_decay = Linear(dim, heads), Linear(dim, heads)
        self.to_momentum = Linear(dim, heads) if momentum else None
        self.combine = Linear(inner, dim, bias=False) if heads > 1 else None
        self.retrieve_gate = Linear(dim, heads, bias=False) if heads > 1 else None

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """Store the sequence and read it.

        Raises:
            ValueError: x is not (B, N ≥ 1, C).
        """
        dim = self.to_queries.in_features
        if x.ndim != 3 or x.shape[2] != dim or x.shape[1] == 0:
            raise ValueError(f"LucidrainsMemory: x must be (B, N, {dim}) with N ≥ 1, got {tuple(x.shape)}")
        tokens, chunk = x.shape[1], self.chunk
        start = [w.repeat(len(x), *(1,) * (w.ndim - 1)) for w in (self.gain, *self.weights)]  # (B·H, …)
        updates = self._stored(x[:, : tokens // chunk * chunk], start)
        # Chunks of the sequence, moved right by one token, each with its own weights.
        front = 1 % chunk
        first = 1 // chunk
        query = self.retrieve_norm(x)
        q = self._normed(self._heads(self.to_queries(query)), self.q_gain)
        groups = -(-(tokens + front) // chunk)
        q = F.pad(q, (0, 0, front, groups * chunk - tokens - front)).flatten(0, 1).unflatten(1, (groups, chunk))
        gain, *weights = (u[:, first : first + groups] for u in updates)
        read = F.layer_norm(forward_trace(tuple(weights), q)[1][-1], q.shape[-1:]) * (gain[:, :, None] + 1) + q
        out = read.flatten(1, 2)[:, front : front + tokens].unflatten(0, (len(x), self.heads))
        if self.retrieve_gate is not None:
            out = out * torch.sigmoid(self.retrieve_gate(query)).mT[..., None]
        out = out.transpose(1, 2).flatten(2)
        return out if self.combine is None else self.combine(out)

    def _stored(self, x: Tensor, start: list[Tensor]) -> list[Tensor]:
        """Gain and weights after 0, 1, … chunks: (B·H, T + 1, …)."""
        chunk, updates = self.chunk, [[w[:, None]] for w in start]
        if not x.shape[1]:
            return [parts[0] for parts in updates]
        x = self.store_norm(x)
        mean = x.unflatten(1, (-1, chunk)).mean(2)
        step = self._per_head(torch.sigmoid(self.to_step(x)) * self.max_step)
        keep = 1 - self._per_head(torch.sigmoid(self.to_decay(mean)))
        inertia = None if self.to_momentum is None else self._per_head(torch.sigmoid(self.to_momentum(mean)))
        keys = self._normed(self._heads(self.to_keys(x)), self.k_gain).flatten(0, 1)
        values = self._heads(self.to_values(x)).flatten(0, 1)
        keys, values, step = (t.unflatten(1, (-1, chunk)) for t in (keys, values, step))
        anchor, last = start, [None] * len(start)
        segment = keys.shape[1] if self.batch_size is None else self.batch_size // chunk
        for begin in range(0, keys.shape[1], segment):
            now = slice(begin, begin + segment)
            for number, surprise in enumerate(self._surprises(anchor, keys[:, now], values[:, now], step[:, now])):
                if inertia is not None:
                    surprise = linear_scan(inertia[:, now], surprise, last[number])
                    last[number] = surprise[:, -1]  # pyright: ignore[reportArgumentType, reportCallIssue]
                updates[number].append(linear_scan(keep[:, now], surprise, updates[number][-1][:, -1]))
            anchor = [parts[-1][:, -1] for parts in updates]
        return [torch.cat(parts, dim=1) for parts in updates]

    def _surprises(self, anchor: list[Tensor], keys: Tensor, values: Tensor, step: Tensor) -> list[Tensor]:
        """Negative gradients of gain and weights, summed over each chunk: (B·H, T, …)."""
        gain, *layers = (w[:, None] for w in anchor)
        inputs, outputs = forward_trace(tuple(layers), keys)
        out, width = outputs[-1], keys.shape[-1]
        centered = out - out.mean(-1, keepdim=True)
        scale = (centered.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        unit = centered * scale
        error = unit * (gain[:, :, None] + 1) + keys - values
        delta = error * (-2 / width * step[..., None])
        d_gain = (delta * unit).sum(2)
        d_unit = delta * (gain[:, :, None] + 1)
        mean, slope = d_unit.mean(-1, keepdim=True), (d_unit * unit).mean(-1, keepdim=True)
        deltas = backward_trace(tuple(layers), outputs, scale * (d_unit - mean - unit * slope))
        return [d_gain, *(a.mT @ d for a, d in zip(inputs, deltas, strict=True))]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _per_head(self, x: Tensor) -> Tensor:
        return x.mT.flatten(0, 1)

    def _normed(self, x: Tensor, gain: Tensor | None) -> Tensor:
        return x if gain is None else F.rms_norm(x, x.shape[-1:]) * (gain + 1)

    def load_peer(self, state: Mapping[str, Tensor]) -> None:
        """Take the parameters of a titans-pytorch ``NeuralMemory.state_dict()``; its unused copies are passed over.

        Raises:
            ValueError: keys that are missing or not of these options.
        """
        wanted = {ours: theirs for ours, theirs in KEY_MAP.items() if ours in dict(self.named_parameters())}
        wanted |= {f"weights.{i}": f"memory_model_parameters.{i + 1}" for i in range(len(self.weights))}
        given = {key for key in state if not key.startswith("memory_model.")}
        if given != set(wanted.values()):
            missing, extra = sorted(set(wanted.values()) - given), sorted(given - set(wanted.values()))
            raise ValueError(f"LucidrainsMemory.load_peer: missing keys {missing}, keys of other options {extra}")
        self.load_state_dict({ours: state[theirs] for ours, theirs in wanted.items()})


KEY_MAP = {
    "store_norm.weight": "store_norm.weight",
    "retrieve_norm.weight": "retrieve_norm.weight",
    "q_gain": "q_norm.gamma",
    "k_gain": "k_norm.gamma",
    "gain": "memory_model_parameters.0",
    "to_queries.weight": "to_queries.weight",
    "to_keys.weight": "to_keys.weight",
    "to_values.weight": "to_values.weight",
    "to_step.weight": "to_adaptive_step.0.weight",
    "to_step.bias": "to_adaptive_step.0.bias",
    "to_momentum.weight": "to_momentum.0.weight",
    "to_momentum.bias": "to_momentum.0.bias",
    "to_decay.weight": "to_decay_factor.0.weight",
    "to_decay.bias": "to_decay_factor.0.bias",
    "combine.weight": "combine_heads.weight",
    "retrieve_gate.weight": "retrieve_gate.0.weight",
}
