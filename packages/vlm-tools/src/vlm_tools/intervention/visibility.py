"""Which keys a query sees: a mask of transformers, turned into the arguments of attn_core's operators."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """One of: everything, causal with hidden keys, or an arbitrary bias.

    Attributes:
        queries: number of queries.
        keys: keys that any query may see; keys behind them (a static cache's empty places) are cut off.
        causal: ``"lower_right"`` (queries are the last ones of ``keys``) or None.
        key_mask: True where a key is visible; None if all are.
        bias: 0 where visible, −inf where not; None unless neither of the others says it all.
    """

    queries: int
    keys: int
    causal: Literal["lower_right"] | None
    key_mask: Bool[Tensor, "B M"] | None
    bias: Float[Tensor, "B 1 N M"] | None

    def rows(self, start: int = 0) -> dict[str, Any]:
        """Arguments ``causal``, ``key_mask``, ``bias`` for the queries from ``start`` on."""
        bias = None if self.bias is None else self.bias[:, :, start:]
        return {"causal": self.causal, "key_mask": self.key_mask, "bias": bias}

    def dense(self, batch: int, start: int = 0, *, device: torch.device) -> Bool[Tensor, "B N M"]:
        """True where a query from ``start`` on sees a key; for few rows, it is as large as the map."""
        rows = self.queries - start
        seen = torch.ones(batch, rows, self.keys, dtype=torch.bool, device=device)
        if self.causal is not None:
            seen = seen.tril(self.keys - rows)
        if self.key_mask is not None:
            seen = seen & self.key_mask[:, None]
        if self.bias is not None:
            seen = seen & (self.bias[:, 0, start:] == 0)
        return seen


def visibility(
    mask: Bool[Tensor, "B 1 N M"] | None, *, queries: int, keys: int, dtype: torch.dtype = torch.float32
) -> Visibility:
    """What a mask of transformers' ``sdpa_mask`` says.

    Without a mask several queries are causal from the upper left corner (the cache's places behind them are empty), and
    a single one sees every key. A mask that is causal over visible keys is recognized, so that no bias is held.

    Args:
        mask: True = visible.
        dtype: of the bias.
    """
    if mask is None:
        return Visibility(queries, min(queries, keys) if queries > 1 else keys, "lower_right" if queries > 1 else None,
                          None, None)  # fmt: skip
    mask = mask[..., :keys]
    last = mask[:, 0, -1]
    if queries == 1:
        return Visibility(1, keys, None, last, None)
    used = keys
    if not bool(last[:, -1].any()):  # empty places of a static cache
        used = int(mask.any(dim=(0, 1, 2)).nonzero().max()) + 1 if bool(mask.any()) else 1
        mask, last = mask[..., :used], last[:, :used]
    if used >= queries:
        causal = torch.ones(queries, used, dtype=torch.bool, device=mask.device).tril(used - queries)
        if bool((mask[:, 0] == (causal & last[:, None])).all()):
            return Visibility(queries, used, "lower_right", None if bool(last.all()) else last, None)
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    return Visibility(queries, used, None, None, bias)
