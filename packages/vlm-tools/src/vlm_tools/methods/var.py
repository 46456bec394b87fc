"""VAR: heads that look at the image move attention from sinks to the rest of the image.

Paper: Kang et al., See What You Are Told: Visual Attention Sink in Large Multimodal Models, ICLR 2025, arXiv
2503.03321. Official code: seilk/VisAttnSink, ``src/logic/logic.py`` (``DimProspector``, ``HeadFork``,
``VARProcessor``).

The same: sinks from the input of each layer (from layer 2, tau 20), frozen after the prompt; rows behind the image
and decoded rows; selection of (row, head) by visual mass and by the share of sinks in it; text sinks pay too.
Different: batches, left padding, beams and grouped heads work; no N×N map (rows before the image are ordinary
attention, the others two passes by `attn_core.visual_attention_redistribution`); `keep` is what the official ``p``
means (the paper's p is 1 − keep), `min_nonsink_ratio` is 1 − the official rho (the paper's own definition).
``skip_last_layer=True`` is the paper, False what the released code does. Checked in ``tests/methods/test_var.py``.

Shapes: as the model's.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attn_core import visual_attention_redistribution
from attn_core.catalog import Card, Entry
from attn_core.composites.visual_attention_redistribution import sink_tokens
from vlm_tools.intervention.method import (
    AttentionCall,
    Method,
    check_number,
    check_share,
    check_switch,
    checked_numbers,
    last_rows,
    note,
)
from vlm_tools.methods.sinks import TAU, check_reachable, known_sinks

if TYPE_CHECKING:
    from vlm_tools.intervention.hooking import Run


class VAR(Method):
    """Visual attention redistribution.

    Args:
        dims: sink dimensions; None takes the known ones of the decoder (`vlm_tools.methods.sinks`).
        tau: a token is a sink if |x| / RMS(x) exceeds it in a sink dimension.
        min_nonsink_ratio: least share of a row's visual attention outside sinks. Paper: general 0.8, hallucination 0.5.
        summ: least visual attention of a row.
        keep: what sinks keep of their attention.
        skip_last_layer: leave the last layer alone, as the paper says and the released code does not.
        layers: layers to change; 2 … last by default.

    Raises:
        ValueError: a share outside [0, 1]; in `intervene`, a decoder whose sinks are unknown or too narrow for ``tau``.
    """

    name = "var"
    needs_hidden = True

    def __init__(
        self,
        *,
        dims: Sequence[int] | None = None,
        tau: float = TAU,
        min_nonsink_ratio: float = 0.5,
        summ: float = 0.2,
        keep: float = 0.6,
        skip_last_layer: bool = False,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(layers)
        for name, value in (("min_nonsink_ratio", min_nonsink_ratio), ("summ", summ), ("keep", keep)):
            check_share("VAR", name, value)
        check_number("VAR", "tau", tau, "be positive", lambda value: value > 0)
        check_switch("VAR", "skip_last_layer", skip_last_layer)
        self.dims = None if dims is None else checked_numbers("VAR", "dims", dims)
        self.tau = tau
        self.min_nonsink_ratio = min_nonsink_ratio
        self.summ = summ
        self.keep = keep
        self.skip_last_layer = skip_last_layer
        self._bound: tuple[int, ...] = self.dims or ()

    def default_layers(self, count: int) -> Sequence[int]:
        """All but the first two."""
        return range(min(2, count), count - self.skip_last_layer)

    def bind(self, run: "Run") -> None:
        """Find the sink dimensions."""
        check_reachable(run.text_config.hidden_size, self.tau, "VAR")
        if self.dims is None:
            known = known_sinks(run.text_config)
            if known is None:
                config = run.text_config
                raise ValueError(
                    f"VAR: sink dimensions of {config.model_type} with width {config.hidden_size} and "
                    f"{config.num_hidden_layers} layers are unknown; find them with vlm_tools.find_sinks and pass dims="
                )
            self._bound = known.dims
        elif max(self.dims, default=0) >= run.text_config.hidden_size:
            raise ValueError(f"VAR: the decoder has dimensions 0 … {run.text_config.hidden_size - 1}, "
                             f"got dims={list(self.dims)}")  # fmt: skip

    def attend(self, call: AttentionCall) -> Float[Tensor, "B N H D"]:
        """Rows before the image stay; the others are redistributed."""
        start = last_rows(call.after_image)
        if call.prefill:
            assert call.hidden is not None
            found = sink_tokens(call.hidden, self._bound, tau=self.tau)
            earlier = call.state.get("sinks")
            call.state["sinks"] = found if earlier is None or call.q.shape[2] >= call.visible.keys else (
                torch.cat([earlier, found], dim=1)
            )  # fmt: skip
        if start == call.q.shape[2]:
            return call.plain()
        k, v = call.visible_keys
        changed, chosen = visual_attention_redistribution(
            call.q[:, :, start:],
            k,
            v,
            call.visual,
            call.align(call.state["sinks"]),
            rho=1 - self.min_nonsink_ratio,
            summ=self.summ,
            p=self.keep,
            query_mask=call.after_image[:, start:],
            scale=call.scale,
            **call.visible.rows(start),
        )
        note(call, chosen)
        return torch.cat([_before(call, start), changed.transpose(1, 2)], dim=1)


def _before(call: AttentionCall, rows: int) -> Float[Tensor, "B rows H D"]:
    """Ordinary attention of the first queries; those behind are not computed where a slice of the keys says it all."""
    visible = call.visible
    if visible.causal is None or visible.key_mask is not None or visible.queries != visible.keys:
        return call.plain()[:, :rows]
    q, k, v = (x[:, :, :rows] for x in (call.q, call.k, call.v))
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=call.scale, enable_gqa=grouped).transpose(1, 2)


CARD = Card(
    family="VAR",
    paper="2503.03321",
    code="https://github.com/seilk/VisAttnSink",
    license="",
    test="methods/test_var.py",
)
ENTRIES = [Entry("var", VAR, CARD("visual attention redistribution"))]
