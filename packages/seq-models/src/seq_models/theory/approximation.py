"""How well sparse, low-rank and both together approximate a matrix of attention, by the entropy of its rows.

The study of Scatterbrain's paper (arXiv 2110.15343): peaked rows are easy for a sparse support and hard for random
features, flat ones the other way round. Measured here (32 keys, 32 features, five seeds): both together err less than
each part alone on flat rows and in between (0.302 beside 0.449 and 2.084 at temperature 0.25, 0.315 beside 0.974 and
0.391 at 1). **On peaked rows they do not**: the features' noise joins the small error of the support (0.121 beside
0.087 at temperature 2, 0.013 beside 0.011 at 4), and at equal memory, twice the keys or twice the features, the better
of the parts wins at most temperatures; what both spare is knowing which. Queries and keys lie in the same clusters;
``temperature``, the factor of their products, peaks the rows.
``python -m seq_models.theory.approximation --out FOLDER`` measures and draws it.
"""

import argparse
import json
import math
from pathlib import Path
from statistics import mean

import torch
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

KINDS = ("sparse", "low-rank", "both", "sparse twice", "low-rank twice")
TEMPERATURES = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)


def clustered(
    tokens: int, dim: int, clusters: int, generator: torch.Generator
) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N D"]]:
    """Queries and keys around common centers, of length about D^¼ so that q·k/√D is about 1 within a cluster."""
    centers = torch.randn(clusters, dim, generator=generator, dtype=torch.float64)
    q, k = (
        centers[torch.randint(clusters, (tokens,), generator=generator)]
        + 0.5 * torch.randn(tokens, dim, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    return q * dim**-0.25, k * dim**-0.25


def estimated(
    q: Float[Tensor, "N D"], k: Float[Tensor, "N D"], features: int, generator: torch.Generator
) -> Float[Tensor, "N N"]:
    """φ(q)·φ(k), an unbiased estimate of exp(q·k) from symmetric positive random features in orthogonal directions."""
    dim = q.shape[1]
    drawn = torch.randn(-(-features // 2 // dim), dim, dim, generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(drawn)[0].mT.flatten(0, 1)[: features // 2]
    lengths = torch.randn(len(directions), dim, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
    p = torch.cat([directions * lengths, -directions * lengths])
    phi = [torch.exp(x @ p.T - x.square().sum(1, keepdim=True) / 2) / math.sqrt(len(p)) for x in (q, k)]
    return phi[0] @ phi[1].T


def approximations(
    q: Float[Tensor, "N D"], k: Float[Tensor, "N D"], size: int, generator: torch.Generator
) -> dict[str, Float[Tensor, "N N"]]:
    """Rows of attention by each kind: ``size`` kept keys, as many random features, both, and twice as many of each.

    The support are the largest entries of a row, what a search for near keys aims at.
    """
    weight = torch.exp(q @ k.T)

    def support(count: int) -> Tensor:
        return torch.zeros_like(weight, dtype=torch.bool).scatter(1, weight.topk(count, 1).indices, value=True)

    low_rank = estimated(q, k, size, generator)
    matrices = (
        weight * support(size),
        low_rank,
        torch.where(support(size), weight, low_rank),
        weight * support(2 * size),
        estimated(q, k, 2 * size, generator),
    )
    return {kind: matrix / matrix.sum(1, keepdim=True) for kind, matrix in zip(KINDS, matrices, strict=True)}


def study(
    temperatures: tuple[float, ...] = TEMPERATURES,
    *,
    tokens: int = 256,
    dim: int = 16,
    clusters: int = 16,
    size: int = 32,
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
) -> list[dict[str, float]]:
    """Rows ``{"temperature", "entropy", …}`` with a column for each of ``KINDS``: mean entropy of a row in nats, and
    errors ‖approximation − attention‖ / ‖attention‖ (Frobenius), means over seeds.
    """
    rows = []
    for temperature in temperatures:
        found: list[dict[str, float]] = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            q, k = (x * math.sqrt(temperature) for x in clustered(tokens, dim, clusters, generator))
            exact = (q @ k.T).softmax(1)
            entropy = float(-(exact * exact.clamp(min=1e-300).log()).sum(1).mean())
            parts = approximations(q, k, size, generator)
            errors = {kind: float((part - exact).norm() / exact.norm()) for kind, part in parts.items()}
            found.append({"entropy": entropy, **errors})
        rows.append({"temperature": temperature, **{key: mean(f[key] for f in found) for key in found[0]}})
    return rows


def draw(rows: list[dict[str, float]], path: Path) -> None:
    """Errors against entropy."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for kind in KINDS:
        axes.semilogy([row["entropy"] for row in rows], [row[kind] for row in rows], marker="o", label=kind)
    axes.set_xlabel("entropy of a row of attention, nats")
    axes.set_ylabel("relative error")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Write ``approximation.json`` and ``approximation.png``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path(), help="folder")
    given = parser.parse_args()
    rows = study()
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "approximation.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, given.out / "approximation.png")
    for row in rows:
        print("  ".join(f"{key} {value:.3f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
