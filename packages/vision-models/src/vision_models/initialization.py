"""How weights start."""

from timm.layers import trunc_normal_ as drawn_by_timm  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor


def trunc_normal_(tensor: Tensor, std: float, a: float = -2.0, b: float = 2.0) -> Tensor:
    """timm's truncated normal in place; on the meta device nothing is drawn.

    torch traces ``clamp_`` through Python there: four fifths of the time in which a network of no memory is built.
    """
    return tensor if tensor.is_meta else drawn_by_timm(tensor, std=std, a=a, b=b)
