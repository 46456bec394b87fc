"""The control of all comparisons: the code path of the methods, which changes nothing.

Checked in ``tests/intervention/test_every_family.py``.
"""

from jaxtyping import Float
from torch import Tensor

from attn_core import attention
from attn_core.catalog import Card, Entry
from vlm_tools.intervention.method import AttentionCall, Method


class Identity(Method):
    """Changes nothing, through the same code path as every other method: the control of all comparisons."""

    name = "identity"
    needs_image = False

    def attend(self, call: AttentionCall) -> Float[Tensor, "B N H D"]:
        """Attention by `attn_core.attention`."""
        k, v = call.visible_keys
        out, _ = attention(call.q, k, v, scale=call.scale, **call.visible.rows())
        return out.transpose(1, 2)


CARD = Card(family="Identity", paper="1706.03762", code="", license="", test="intervention/test_every_family.py")
ENTRIES = [
    Entry(
        "identity",
        Identity,
        CARD("changes nothing, through the same code path as every other method: the control of all comparisons"),
    )
]
