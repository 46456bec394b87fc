"""What stays of a mask if every class is one thing."""

import numpy as np


def largest_parts(mask: np.ndarray) -> np.ndarray:
    """Of each class the largest part that is connected through faces; the rest becomes background."""
    from scipy import ndimage

    kept = np.zeros_like(mask)
    for k in range(1, int(mask.max()) + 1):
        parts, count = ndimage.label(mask == k)  # pyright: ignore[reportGeneralTypeIssues]
        if count:
            sizes = np.bincount(parts.ravel())
            sizes[0] = 0
            kept[parts == sizes.argmax()] = k
    return kept
