"""Pointer Networks: the output is a sequence of indices of the input, chosen by additive attention.

Paper: Vinyals, Fortunato, Jaitly, Pointer Networks, NIPS 2015, arXiv 1506.03134. The authors released no code; a
community version for tours is shirgur/PointerNet (``PointerNet.py``).

Same as the paper: one LSTM reads the points, another, started with its last state, points; its inputs are the
coordinates of the point chosen before, its scores u_j = vᵀ tanh(W₁ e_j + W₂ d_i) without biases, the end is one more
position to point at; beam search, for tours among the cities that are left.
Beyond it, as options: glimpses and the bound C·tanh(u) on scores of Bello et al. 2016 (arXiv 1611.09940), an encoder
without order (transformer), padded batches.
Differs from shirgur/PointerNet: teacher forcing, the loss of log-probabilities (there, softmax is taken twice), a
learned first input, projections without biases.
Numbers are checked in ``test_pointer_network.py``: parameters (664,068 at H = 256), scores against the formula, beam
search against the enumeration of all sequences.

Shapes: points (B, N, C) float → pointers (B, T) int64, from 1; 0 is the end and fills what follows.
"""

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from attn_core import additive_attention, attention
from attn_core.catalog import Card, Entry
from attn_core.nn import Linear, through_gelu

Constraint = Literal["none", "distinct", "tour"]
LstmState = tuple[Float[Tensor, "1 B H"], Float[Tensor, "1 B H"]]


class Encoded(NamedTuple):
    """What the decoder reads.

    Attributes:
        states: of the end (first) and of the points.
        keys: W₁ of the states.
        visible: False for padding.
        start: the decoder's first state.
    """

    states: Float[Tensor, "B M H"]
    keys: Float[Tensor, "B M H"]
    visible: Bool[Tensor, "B M"] | None
    start: LstmState


class Decoded(NamedTuple):
    """Answers of a batch.

    Attributes:
        pointers: from 1; 0 behind the end.
        log_prob: of the whole sequences.
    """

    pointers: Int[Tensor, "B T"]
    log_prob: Float[Tensor, " B"]


class PointAttention(nn.Module):
    """Scores of Pointer Networks, or with ``glimpse`` the states they average.

    Shapes: query (B, T, H), keys (B, M, H) → scores (B, T, M); with values (B, M, H) → (B, T, H).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = Linear(width, width, bias=False)
        self.key = Linear(width, width, bias=False)
        self.score = nn.Parameter(torch.empty(width))

    def forward(
        self,
        query: Float[Tensor, "B T H"],
        keys: Float[Tensor, "B M H"],
        visible: Bool[Tensor, "B M"] | None,
        values: Float[Tensor, "B M H"] | None = None,
    ) -> Float[Tensor, "B T _"]:
        """Scores (B, T, M) of the keys, −inf where not ``visible``; with ``values`` their weighted mean (B, T, H)."""
        return additive_attention(self.query(query), keys, self.score, values, key_mask=visible)[0]


class TransformerEncoder(nn.Module):
    """Pre-norm transformer; without positions permuted points give permuted states.

    Shapes: points (B, N, C) → (B, N, H).
    """

    def __init__(self, width: int, channels: int, *, layers: int, heads: int, positions: bool = False) -> None:
        super().__init__()
        self.heads, self.positions = heads, positions
        self.embed = Linear(channels, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2 * layers + 1)])
        self.qkv = nn.ModuleList([Linear(width, 3 * width) for _ in range(layers)])
        self.out = nn.ModuleList([Linear(width, width) for _ in range(layers)])
        self.widen = nn.ModuleList([Linear(width, 4 * width) for _ in range(layers)])
        self.narrow = nn.ModuleList([Linear(4 * width, width) for _ in range(layers)])

    def forward(self, points: Float[Tensor, "B N C"], visible: Bool[Tensor, "B N"] | None) -> Float[Tensor, "B N H"]:
        """One code for each point; points that are not ``visible`` are read by none."""
        x = self.embed(points)
        if self.positions:
            x = x + _sinusoids(points.shape[1], x.shape[2]).to(x)
        for layer in range(len(self.qkv)):
            heads = self.qkv[layer](self.norms[2 * layer](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            mixed = attention(heads[0], heads[1], heads[2], key_mask=visible)[0]
            x = x + self.out[layer](mixed.transpose(1, 2).flatten(2))
            x = x + self.narrow[layer](through_gelu(self.widen[layer], self.norms[2 * layer + 1](x)))
        return self.norms[-1](x)


def _sinusoids(count: int, width: int) -> Float[Tensor, "N H"]:
    """Sines, then cosines, of the index at frequencies from 1 to 1/10000 (Vaswani et al. 2017, arXiv 1706.03762)."""
    half = -(-width // 2)
    angle = torch.arange(count)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :width]


class PointerNetwork(nn.Module):
    """Encoder, decoder and pointer.

    Args:
        hidden: width H of the states; the paper takes 256 and 512.
        channels: coordinates of a point.
        encoder: ``"lstm"`` as in the paper, or ``"transformer"``, whose answer does not depend on the order of the
            points except through the answer's own convention.
        encoder_layers, encoder_heads: of the transformer.
        encoder_positions: whether the transformer knows the order of the points, which the answers of Delaunay follow.
        glimpses: times that the query is replaced by what attention with it reads, before pointing.
        tanh_clip: C of scores C·tanh(u); None leaves them unbounded.
        init_range: weights start uniform in ± this; the paper's 0.08. None: torch's own ranges.

    Raises: ValueError if an argument is out of range.
    """

    def __init__(
        self,
        hidden: int = 256,
        channels: int = 2,
        *,
        encoder: Literal["lstm", "transformer"] = "lstm",
        encoder_layers: int = 3,
        encoder_heads: int = 8,
        encoder_positions: bool = False,
        glimpses: int = 0,
        tanh_clip: float | None = None,
        init_range: float | None = 0.08,
    ) -> None:
        super().__init__()
        for name, value, low in (("hidden", hidden, 1), ("channels", channels, 1), ("glimpses", glimpses, 0)):
            if value < low:
                raise ValueError(f"PointerNetwork: {name} must be at least {low}, got {name}={value}")
        if encoder not in ("lstm", "transformer"):
            raise ValueError(f"PointerNetwork: encoder must be 'lstm' or 'transformer', got encoder={encoder!r}")
        if encoder == "transformer" and (encoder_heads < 1 or hidden % encoder_heads):
            raise ValueError(
                f"PointerNetwork: hidden must be a multiple of encoder_heads, got hidden={hidden} and "
                f"encoder_heads={encoder_heads}"
            )
        if tanh_clip is not None and not tanh_clip > 0:
            raise ValueError(f"PointerNetwork: tanh_clip must be positive or None, got tanh_clip={tanh_clip}")
        self.hidden = hidden
        self.channels = channels
        self.tanh_clip = tanh_clip
        self.encoder: nn.Module = (
            nn.LSTM(channels, hidden, batch_first=True)
            if encoder == "lstm"
            else TransformerEncoder(
                hidden, channels, layers=encoder_layers, heads=encoder_heads, positions=encoder_positions
            )
        )
        self.decoder = nn.LSTM(channels, hidden, batch_first=True)
        self.pointer = PointAttention(hidden)
        self.glimpses = nn.ModuleList([PointAttention(hidden) for _ in range(glimpses)])
        self.go = nn.Parameter(torch.empty(channels))
        self.end_point = nn.Parameter(torch.empty(channels))
        self.end_state = nn.Parameter(torch.empty(hidden))
        for name, parameter in self.named_parameters():
            if init_range is not None and "norm" not in name:
                nn.init.uniform_(parameter, -init_range, init_range)
            elif (parameter.ndim == 1 and "." not in name) or name.endswith("score"):
                nn.init.uniform_(parameter, -1 / math.sqrt(hidden), 1 / math.sqrt(hidden))

    def encode(self, points: Float[Tensor, "B N C"], lengths: Int[Tensor, " B"] | None = None) -> Encoded:
        """Read the points.

        Args:
            lengths: points of each row; what stands behind them is padding.

        Raises:
            ValueError: shapes that do not fit, no points, a length out of range.
        """
        if points.ndim != 3 or points.shape[-1] != self.channels:
            raise ValueError(f"PointerNetwork: points must be (B, N, {self.channels}), got {tuple(points.shape)}")
        batch, count = points.shape[:2]
        if count == 0 or batch == 0:
            raise ValueError(f"PointerNetwork: there are no points, got shape {tuple(points.shape)}")
        visible = None
        if lengths is not None:
            if lengths.shape != (batch,) or not bool(((lengths > 0) & (lengths <= count)).all()):
                raise ValueError(
                    f"PointerNetwork: lengths must be {batch} numbers in 1…{count}, got {lengths.tolist()}"
                )
            visible = torch.arange(count, device=points.device) < lengths[:, None]
        if isinstance(self.encoder, nn.LSTM):
            if lengths is None:
                states, (h, c) = self.encoder(points)
            else:
                packed = pack_padded_sequence(points, lengths.cpu(), batch_first=True, enforce_sorted=False)
                packed_states, (h, c) = self.encoder(packed)
                states = pad_packed_sequence(packed_states, batch_first=True, total_length=count)[0]
        else:
            states = self.encoder(points, visible)
            weight = points.new_ones(batch, count) if visible is None else visible.to(points.dtype)
            h = ((states * weight[..., None]).sum(1) / weight.sum(1, keepdim=True))[None]
            c = torch.zeros_like(h)
        states = torch.cat([self.end_state.expand(batch, 1, -1), states], dim=1)
        if visible is not None:
            visible = F.pad(visible, (1, 0), value=True)
        return Encoded(states, self.pointer.key(states), visible, (h, c))

    def _scores(self, encoded: Encoded, query: Float[Tensor, "B T H"]) -> Float[Tensor, "B T M"]:
        """Scores of the end and of the points, without the mask."""
        for glimpse in self.glimpses:
            query = glimpse(query, glimpse.key(encoded.states), encoded.visible, encoded.states)  # pyright: ignore[reportCallIssue]
        scores = self.pointer(query, encoded.keys, None)
        return scores if self.tanh_clip is None else self.tanh_clip * scores.tanh()

    def forward(
        self,
        points: Float[Tensor, "B N C"],
        pointers: Int[Tensor, "B T"],
        *,
        lengths: Int[Tensor, " B"] | None = None,
        constraint: Constraint = "none",
    ) -> Float[Tensor, "B T N+1"]:
        """Log-probabilities of end and points at every step, given the right pointers before it.

        Raises:
            ValueError: as :meth:`encode`; pointers that are not (B, T) or point at nothing.
        """
        encoded = self.encode(points, lengths)
        _check_constraint(constraint)
        batch, count = points.shape[:2]
        if pointers.ndim != 2 or pointers.shape[0] != batch:
            raise ValueError(f"PointerNetwork: pointers must be ({batch}, T), got {tuple(pointers.shape)}")
        if pointers.numel() and not 0 <= int(pointers.min()) <= int(pointers.max()) <= count:
            raise ValueError(
                f"PointerNetwork: pointers must be in 0…{count}, got {int(pointers.min())}…{int(pointers.max())}"
            )
        known = torch.cat([self.end_point.expand(batch, 1, -1), points], dim=1)
        before = known.gather(1, pointers[:, :-1, None].expand(-1, -1, self.channels))
        inputs = torch.cat([self.go.expand(batch, 1, -1), before], dim=1)
        query = self.decoder(inputs, encoded.start)[0]
        scores = self._scores(encoded, query)
        hidden = None if encoded.visible is None else ~encoded.visible[:, None]
        if constraint != "none":
            chosen = F.one_hot(pointers, count + 1).cumsum(1).roll(1, 1)
            chosen[:, 0] = 0
            gone = chosen > 0
            gone[..., 0] = constraint == "tour"
            hidden = gone if hidden is None else gone | hidden
            if constraint == "tour":
                # Behind the last city of a shorter row nothing is left to see but the end.
                hidden[..., 0] &= ~hidden[..., 1:].all(-1)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        return scores.log_softmax(-1)

    @torch.no_grad()
    def decode(
        self,
        points: Float[Tensor, "B N C"],
        *,
        lengths: Int[Tensor, " B"] | None = None,
        constraint: Constraint = "none",
        beam: int = 1,
        max_steps: int | None = None,
    ) -> Decoded:
        """The most probable pointers that beam search finds; ``beam=1`` is greedy.

        Args:
            constraint: ``"none"``; ``"distinct"``: no point twice; ``"tour"``: every point once.
            max_steps: longest answer; by default N + 1, without a constraint 6·N + 1 (the longest triangulation).

        Raises:
            ValueError: as :meth:`encode`; ``beam`` or ``max_steps`` below 1; an unknown constraint.
        """
        _check_constraint(constraint)
        batch, count = points.shape[:2]
        longest = max_steps or {"none": 6 * count + 1, "distinct": count + 1, "tour": count}[constraint]
        for name, value in (("beam", beam), ("max_steps", longest)):
            if value < 1:
                raise ValueError(f"PointerNetwork.decode: {name} must be at least 1, got {name}={value}")
        encoded = self.encode(points, lengths)
        known = torch.cat([self.end_point.expand(batch, 1, -1), points], dim=1)
        total = points.new_zeros(batch, 1)  # of each beam, (B, K)
        state = encoded.start
        inputs = self.go.expand(batch, 1, -1)
        open_ = torch.ones(batch, 1, dtype=torch.bool, device=points.device)
        free = torch.ones(batch, 1, count + 1, dtype=torch.bool, device=points.device)
        if encoded.visible is not None:
            free &= encoded.visible[:, None]
        if constraint == "tour":
            free[..., 0] = False
        chosen = torch.zeros(batch, 1, 0, dtype=torch.long, device=points.device)
        for _ in range(longest):
            width = total.shape[1]
            out, state = self.decoder(inputs.reshape(batch * width, 1, -1), state)
            scores = self._scores(encoded, out.view(batch, width, -1)).masked_fill(~free, -math.inf)
            # A finished beam goes on with the end, at no cost.
            finished = torch.full_like(scores, -math.inf)
            finished[..., 0] = 0
            gain = torch.where(open_[..., None], scores.log_softmax(-1), finished)
            candidates = (total[..., None] + gain).flatten(1)
            total, best = candidates.topk(min(beam, candidates.shape[1]), dim=1)
            source, pointer = best // (count + 1), best % (count + 1)
            rows = (torch.arange(batch, device=points.device)[:, None] * width + source).flatten()
            state = (state[0][:, rows], state[1][:, rows])
            inputs = known.gather(1, pointer[..., None].expand(-1, -1, self.channels))
            chosen = torch.cat([_of_beams(chosen, source), pointer[..., None]], dim=-1)
            free = _of_beams(free, source)
            open_ = open_.gather(1, source) & (pointer != 0)
            if constraint != "none":
                end = free[..., :1]
                free = free.scatter(-1, pointer[..., None], value=False)
                if constraint == "distinct":
                    free[..., :1] = end
                else:
                    open_ = open_ & free.any(-1)
            if not bool((open_ & total.isfinite()).any()):
                break
        return Decoded(chosen[:, 0], total[:, 0])


def _check_constraint(constraint: str) -> None:
    if constraint not in ("none", "distinct", "tour"):
        raise ValueError(
            f"PointerNetwork: constraint must be 'none', 'distinct' or 'tour', got constraint={constraint!r}"
        )


def _of_beams(x: Tensor, source: Int[Tensor, "B K"]) -> Tensor:
    return x.gather(1, source[..., None].expand(-1, -1, x.shape[-1]))


VARIANTS: dict[str, dict[str, Any]] = {
    "pointer_network_256": {"hidden": 256},
    "pointer_network_512": {"hidden": 512},
    "test_pointer_network": {"hidden": 32},
    "test_pointer_network_transformer": {
        "hidden": 32,
        "encoder": "transformer",
        "encoder_layers": 1,
        "encoder_heads": 4,
        "glimpses": 1,
        "tanh_clip": 10.0,
    },
}

CARD = Card(family="Pointer Networks", paper="1506.03134", code="", license="", test="models/test_pointer_network.py")
ENTRIES = [
    Entry(
        name,
        partial(PointerNetwork, **variant),
        CARD(
            "points in the plane → indices of points; " + ", ".join(f"{key}={value}" for key, value in variant.items())
        ),
    )
    for name, variant in VARIANTS.items()
]
