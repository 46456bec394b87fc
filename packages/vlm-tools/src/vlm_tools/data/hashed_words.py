"""A text as a vector without a download: every word has a place and a sign by its hash, the same on every machine."""

import re
import zlib
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_WORD = re.compile(r"\w+")


def hashed_words(texts: Sequence[str], dim: int = 384) -> Float[Tensor, "B E"]:
    """Bags of words as unit vectors; order and case do not count, a text without words is 0.

    Two words share a place with a probability of 1 / dim; signs keep sums of such accidents near 0 (Weinberger et al.
    2009, arXiv 0902.2206).

    Raises:
        ValueError: dim below 1, one text in place of a list.
    """
    if dim < 1:
        raise ValueError(f"hashed_words: dim must be at least 1, got dim={dim}")
    if isinstance(texts, str):
        raise ValueError(f"hashed_words: texts must be a list of texts, got the text {texts[:40]!r}")
    found = torch.zeros(len(texts), dim)
    for row, text in zip(found, texts, strict=True):
        for word in _WORD.findall(text.casefold()):
            number = zlib.crc32(word.encode())
            row[(number >> 1) % dim] += 1.0 if number & 1 else -1.0
    return torch.nn.functional.normalize(found, dim=-1)
