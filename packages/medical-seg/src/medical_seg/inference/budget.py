"""Memory that a prediction may take."""

import re
import resource
import sys
from dataclasses import dataclass


@dataclass
class Budget:
    """Memory of this process.

    Attributes:
        allowed: bytes.
        base: bytes that it takes apart from images, labels and sums of logits; None until a first window has passed
            through the network.
    """

    allowed: int
    base: int | None = None


def parse_memory(text: str) -> int:
    """``"4G"`` → bytes; K, M, G, T are powers of 1024.

    Raises: ValueError for anything else.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"--max-mem: expected a size such as 4G or 800M, got {text!r}")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def peak_memory() -> int:
    """Most bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
