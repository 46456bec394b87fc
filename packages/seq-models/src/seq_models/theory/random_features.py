"""Random-feature attention, biased and not, and the random-feature MLP: what a layer learns that trains its last map.

Paper: Fu, Guo, Bai and Mei, What can a Single Attention Layer Learn? A Study Through the Random Features Lens, NeurIPS
2023, arXiv 2307.11353 (no official code).

With x̃ = [x; 1], frozen random matrices W_m and trained vectors v_m:
f(x_0; x_1…x_N) = Σ_m (1/N) Σ_i ReLU(x̃_0ᵀ W_m x̃_i)·⟨v_m, x̃_i⟩: no softmax, a mean over the keys. Entries of W_m have
variance 1/4; the biased variant's mean is ``bias`` times the identity on the first d × d block, which favors functions
of ⟨x_0, x_i⟩. The v_m are fitted by ridge regression in closed form. The peer sees all tokens as one long vector.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

DEVIATION = 0.5  # of the entries of a random matrix


class RandomFeatureAttention(nn.Module):
    """Features of attention with frozen random heads.

    Args:
        heads: M, random matrices.
        dim: d, width of a token.
        bias: mean of the matrices on the diagonal of the first d × d block; 0: the plain variant.

    Shapes: tokens (n, 1 + N, d), the query first → features (n, M·(d + 1)).

    Raises:
        ValueError: sizes below 1; at the call, tokens of another width or without keys.
    """

    weight: Tensor

    def __init__(self, heads: int, dim: int, *, bias: float = 0.0, generator: torch.Generator | None = None) -> None:
        super().__init__()
        for name, value in (("heads", heads), ("dim", dim)):
            if value < 1:
                raise ValueError(f"RandomFeatureAttention: {name} must be at least 1, got {name}={value}")
        weight = DEVIATION * torch.randn(heads, dim + 1, dim + 1, generator=generator, dtype=torch.float64)
        weight[:, range(dim), range(dim)] += bias
        self.dim = dim
        self.register_buffer("weight", weight)

    def forward(self, tokens: Float[Tensor, "n T d"]) -> Float[Tensor, "n F"]:
        """(1/N) Σ_i ReLU(x̃_0ᵀ W_m x̃_i)·x̃_i for every head m."""
        if tokens.ndim != 3 or tokens.shape[1] < 2 or tokens.shape[2] != self.dim:
            raise ValueError(
                f"RandomFeatureAttention: tokens must be (n, 1 + N, {self.dim}) with N ≥ 1, got {tuple(tokens.shape)}"
            )
        x = with_one(tokens)
        asked = torch.einsum("na,mab->nmb", x[:, 0], self.weight.to(x.dtype))
        scores = torch.einsum("nmb,nib->nmi", asked, x[:, 1:]).relu()
        return (scores @ x[:, 1:] / (x.shape[1] - 1)).flatten(1)


class RandomFeatureMLP(nn.Module):
    """ReLU of random projections of all tokens side by side: the peer, which must learn that keys have no order.

    Args:
        features: outputs.
        tokens, dim: 1 + N and d.

    Shapes: tokens (n, 1 + N, d) → (n, features).
    """

    weight: Tensor

    def __init__(self, features: int, tokens: int, dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        weight = DEVIATION * torch.randn(features, tokens * dim + 1, generator=generator, dtype=torch.float64)
        self.register_buffer("weight", weight)

    def forward(self, tokens: Float[Tensor, "n T d"]) -> Float[Tensor, "n F"]:
        """ReLU(W [x_0; …; x_N; 1])."""
        return (with_one(tokens.flatten(1)) @ self.weight.to(tokens.dtype).T).relu()


def with_one(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d+1"]:
    """x̃ = [x; 1]."""
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)


def ridge(features: Float[Tensor, "n F"], target: Float[Tensor, " n"], strength: float) -> Float[Tensor, " F"]:
    """argmin ‖features·w − target‖² + strength·‖w‖², by the smaller of the two systems of equations.

    Raises:
        ValueError: a strength that is not positive.
    """
    if strength <= 0:
        raise ValueError(f"ridge: strength must be positive, got {strength}")
    n, count = features.shape
    if n <= count:  # the dual one
        gram = features @ features.T + strength * torch.eye(n, dtype=features.dtype)
        return features.T @ torch.linalg.solve(gram, target)
    gram = features.T @ features + strength * torch.eye(count, dtype=features.dtype)
    return torch.linalg.solve(gram, features.T @ target)


class Target(NamedTuple):
    """A function of tokens, mean over i of F(x_0, x_i) or F(x_i).

    Attributes:
        kind: ``"beta"`` for ⟨β, x_i⟩, ``"query"`` for ⟨x_0, x_i⟩.
        power: what the product is raised to.
    """

    kind: str
    power: int

    @property
    def title(self) -> str:
        """As in the tables."""
        inner = "⟨β,x_i⟩" if self.kind == "beta" else "⟨x_0,x_i⟩"
        return f"mean {inner}{'' if self.power == 1 else f'^{self.power}'}"

    def __call__(self, tokens: Float[Tensor, "n T d"], beta: Float[Tensor, " d"]) -> Float[Tensor, " n"]:
        """The function's values."""
        with_whom = beta.expand_as(tokens[:, 0]) if self.kind == "beta" else tokens[:, 0]
        return torch.einsum("nd,nid->ni", with_whom, tokens[:, 1:]).pow(self.power).mean(1)


STRENGTHS = (1e-8, 1e-6, 1e-4, 1e-2, 1.0, 100.0)
MODELS = ("RFA", "BRFA", "RF-MLP")


def errors(
    target: Target,
    samples: int,
    *,
    seed: int = 0,
    dim: int = 4,
    keys: int = 16,
    heads: int = 1000,
    bias: float = 2.0,
    tested: int = 1000,
) -> dict[str, float]:
    """Test error of the three models, over the target's variance: 1 is what the mean alone gives.

    Tokens lie on the unit sphere; the ridge is the best of six on the test set, for all models alike. The MLP has as
    many features as attention.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(samples + tested, 1 + keys, dim, generator=generator, dtype=torch.float64)
    tokens = tokens / tokens.norm(dim=-1, keepdim=True)
    beta = torch.randn(dim, generator=generator, dtype=torch.float64)
    values = target(tokens, beta / beta.norm())
    models: dict[str, nn.Module] = {
        "RFA": RandomFeatureAttention(heads, dim, generator=generator),
        "BRFA": RandomFeatureAttention(heads, dim, bias=bias, generator=generator),
        "RF-MLP": RandomFeatureMLP(heads * (dim + 1), 1 + keys, dim, generator=generator),
    }
    center, found = values[:samples].mean(), {}
    for name, model in models.items():
        features = torch.cat([model(part) for part in tokens.split(256)])
        features = features / features[:samples].norm(dim=1).mean()  # one scale of the ridge for all
        trials = []
        for strength in STRENGTHS:
            weight = ridge(features[:samples], values[:samples] - center, strength)
            wrong = features[samples:] @ weight + center - values[samples:]
            trials.append(float(wrong.square().mean() / values[samples:].var()))
        found[name] = min(trials)
    return found
