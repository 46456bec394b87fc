"""Whether a map is faithful to the model (deletion, insertion) and points at the truth (pointing game).

Deletion: image embeddings are replaced by their mean, the most relevant first; the sooner the token's probability
falls, the smaller the area under the curve. Insertion: from the mean alone, the most relevant come back first; the
larger the area, the better (Petsiuk, Das, Saenko 2018, RISE, arXiv 1806.07421; on embeddings in place of pixels, so
that no picture is blurred or painted gray). Pointing game: Zhang et al. 2016, arXiv 1608.00507. Checked in
``tests/agreement/test_faithfulness.py``.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlm_tools.readings.explain import blanked, image_tokens, log_probabilities


class Curves(NamedTuple):
    """Probability of one token while image tokens leave and come back.

    Attributes:
        share: (P,) share of the image tokens that left or came back, 0 … 1.
        deletion: (P,) probability.
        insertion: (P,) probability.
    """

    share: Float[Tensor, " P"]
    deletion: Float[Tensor, " P"]
    insertion: Float[Tensor, " P"]

    @property
    def deletion_area(self) -> float:
        """Small for a faithful map."""
        return float(torch.trapezoid(self.deletion, self.share))

    @property
    def insertion_area(self) -> float:
        """Large for a faithful map."""
        return float(torch.trapezoid(self.insertion, self.share))


def curves(
    model: Any, inputs: Mapping[str, Any], row: int, target: int, heat: Float[Tensor, " T"], *, steps: int = 8
) -> Curves:
    """Deletion and insertion of image tokens in the order of a map; 2 · steps forward passes.

    Args:
        inputs: one prompt, as for `vlm_tools.readings.explain.explain`.
        row: position whose output is explained.
        target: the token predicted there.
        heat: relevance of each image token; among equals the first goes first.
        steps: pieces into which the image tokens are cut.

    Raises:
        ValueError: fewer steps than 1, a map that does not fit the prompt or is not finite.
    """
    if steps < 1:
        raise ValueError(f"curves: steps must be at least 1, got steps={steps}")
    visual = image_tokens(model, inputs)
    places = visual.nonzero().flatten()
    if heat.shape != places.shape:
        raise ValueError(
            f"curves: the prompt has {len(places)} image tokens, the map has the shape {tuple(heat.shape)}"
        )
    if not bool(heat.isfinite().all()):
        raise ValueError("curves: the map holds NaN or infinite values")
    order = places[heat.to(places.device).argsort(dim=-1, descending=True, stable=True)]
    cuts = [round(len(order) * step / steps) for step in range(steps + 1)]

    def probability(hidden: Tensor) -> float:
        def change(embeds: Tensor) -> Tensor:
            return blanked(embeds, visual, hidden)

        return float(log_probabilities(model, inputs, [row], [target], change)[0].exp())

    deletion = [probability(order[:cut]) for cut in cuts]
    # Both begin where the other ends.
    insertion = [deletion[-1], *(probability(order[cut:]) for cut in cuts[1:-1]), deletion[0]]
    share = torch.tensor(cuts, dtype=torch.float64) / max(len(order), 1)
    return Curves(share, torch.tensor(deletion, dtype=torch.float64), torch.tensor(insertion, dtype=torch.float64))


def pointing_game(heat: Float[Tensor, "*S T"], truth: Bool[Tensor, "*S T"]) -> Float[Tensor, "*S"]:
    """Share of a map's largest values that lie on the truth: 1 a hit, 0 a miss; chance is the truth's share of cells.

    Raises:
        ValueError: shapes that differ, a map that is not finite, a truth of another dtype than bool.
    """
    if heat.shape != truth.shape or truth.dtype != torch.bool:
        raise ValueError(
            f"pointing_game: heat and truth must have one shape and truth be bool, got {tuple(heat.shape)} and "
            f"{tuple(truth.shape)} of {truth.dtype}"
        )
    if not bool(heat.isfinite().all()):
        raise ValueError("pointing_game: the map holds NaN or infinite values")
    largest = heat == heat.amax(-1, keepdim=True)
    return (largest & truth).sum(-1).double() / largest.sum(-1)
