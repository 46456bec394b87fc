"""natten.flops over attn_core."""

from typing import Any


def add_natten_handle(flop_ctr: Any) -> Any:
    """The counter as it is: attn_core's operators are counted by torch's counter, see ``attn_core.flops``."""
    return flop_ctr
