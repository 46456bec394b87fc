"""Which image tokens an answer depends on: six readings of one forward pass or a few, each beside its no-image control.

- ``attention``: probabilities of the token's row, averaged over heads and layers, without sink tokens if they are
  known.
- ``rollout``: rows of Π (I + S_l)/2 (Abnar and Zuidema 2020, arXiv 2005.00928).
- ``flow``: VL-SAM's weighted, regularized flow (`vlm_tools.readings.vl_sam`).
- ``chefer``: R ← R + (mean_h relu(A ∘ ∂y/∂A)) R (Chefer et al. 2021, arXiv 2103.15679); holds the maps, so up to
  1,024 tokens.
- ``integrated_gradients``: Sundararajan et al. 2017, arXiv 1703.01365, on the decoder's image embeddings, from their
  mean.
- ``occlusion``: fall of the token's log-probability when windows of image embeddings are replaced by their mean.

The control explains the same token with every image embedding replaced by their mean: what is left there is position,
not content. Checked in ``tests/readings/test_explain.py``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm_tools.intervention.adapters import adapter_of
from vlm_tools.intervention.hooking import intervene
from vlm_tools.intervention.method import AttentionCall, Method
from vlm_tools.methods.sinks import TAU, known_sinks, normalized
from vlm_tools.readings.names import READINGS, Reading
from vlm_tools.readings.vl_sam import LayerRecord, flow_row

LONGEST_MAP = 1024


class Recorder(Method):
    """Keeps queries and keys of every layer: linear memory, any row of any map afterwards."""

    name = "recorder"
    needs_hidden = True

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[int, LayerRecord] = {}
        self.sinks: dict[int, Tensor] = {}
        self.visual: Tensor | None = None

    def attend(self, call: AttentionCall) -> Float[Tensor, "B N H D"]:
        """Ordinary attention."""
        if call.q.shape[0] != 1:
            raise ValueError(f"explain: one prompt at a time, got a batch of {call.q.shape[0]}")
        k, _ = call.visible_keys
        seen = None
        if call.visible.bias is not None or call.visible.key_mask is not None:
            seen = call.visible.dense(1, device=call.q.device)[0]
        self.records[call.layer] = LayerRecord(call.q[0].detach(), k[0].detach(), call.scale, seen)
        self.visual = call.visual[0]
        if call.hidden is not None:
            self.sinks[call.layer] = normalized(call.hidden[0].detach())
        return call.plain()


class _Maps(Method):
    """Dense maps with gradients, for Chefer's rule."""

    name = "chefer"

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def attend(self, call: AttentionCall) -> Float[Tensor, "B N H D"]:
        if call.q.shape[2] > LONGEST_MAP:
            raise ValueError(f"explain: 'chefer' holds N×N maps and takes up to {LONGEST_MAP} tokens, got "
                             f"{call.q.shape[2]}; use 'flow'")  # fmt: skip
        k, v = call.visible_keys
        share = call.q.shape[1] // k.shape[1]
        score = call.q @ k.repeat_interleave(share, 1).transpose(-2, -1) * call.scale
        seen = call.visible.dense(call.q.shape[0], device=call.q.device)[:, None]
        p = score.masked_fill(~seen, torch.finfo(score.dtype).min).softmax(-1)
        p.requires_grad_(True)
        self.maps.append(p)
        return (p @ v.repeat_interleave(share, 1)).transpose(1, 2)


def explain(
    model: Any,
    inputs: Mapping[str, Any],
    rows: Sequence[int],
    targets: Sequence[int] | None = None,
    *,
    reading: Reading = "flow",
    control: bool = False,
    steps: int = 16,
    window: int = 1,
) -> Float[Tensor, "R T"]:
    """Relevance of each image token for tokens of one prompt.

    Args:
        inputs: what the model is called with: one prompt, answer included.
        rows: positions whose output is explained; a token at position p is predicted at p − 1.
        targets: the tokens predicted there, needed by the readings that follow a gradient or a probability.
        reading: see the module.
        control: explain with all image embeddings replaced by their mean.
        steps: of integrated gradients.
        window: image tokens that occlusion hides at a time.

    Raises:
        ValueError: unknown reading, several prompts, a row that does not exist, targets missing, too long a prompt.
    """
    if reading not in READINGS:
        raise ValueError(f"explain: reading must be one of {', '.join(READINGS)}, got reading={reading!r}")
    ids: Tensor = inputs["input_ids"]
    if ids.shape[0] != 1:
        raise ValueError(f"explain: one prompt at a time, got a batch of {ids.shape[0]}")
    wrong = [row for row in rows if not 0 <= row < ids.shape[1]]
    if wrong:
        raise ValueError(f"explain: the prompt has tokens 0 … {ids.shape[1] - 1}, got rows={list(rows)}")
    if reading in ("chefer", "integrated_gradients", "occlusion") and (targets is None or len(targets) != len(rows)):
        raise ValueError(f"explain: {reading!r} needs targets, one token for each of the {len(rows)} rows")
    visual = image_tokens(model, inputs)
    change = (lambda e: blanked(e, visual)) if control else None
    if reading in ("attention", "rollout", "flow"):
        recorder = record(model, inputs, change)
        reader = {"attention": _attention, "rollout": _rollout, "flow": _flow}[reading]
        return torch.stack([reader(model, recorder, row)[visual] for row in rows])
    assert targets is not None
    if reading == "chefer":
        return _chefer(model, inputs, rows, targets, visual, change)
    if reading == "occlusion":
        return _occlusion(model, inputs, rows, targets, visual, window, change)
    return _integrated(model, inputs, rows, targets, visual, steps, change)


def record(model: Any, inputs: Mapping[str, Any], change: Callable[[Tensor], Tensor] | None = None) -> Recorder:
    """Queries and keys of every layer for one prompt."""
    recorder = Recorder()
    with torch.no_grad(), intervene(model, recorder), embeddings_changed(model, change):
        model(**inputs, use_cache=False)
    return recorder


@contextmanager
def embeddings_changed(model: Any, change: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    """``change`` applied to the embeddings (B, N, C) that enter the decoder."""
    if change is None:
        yield
        return

    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "inputs_embeds": change(kwargs["inputs_embeds"])}

    handle = model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def image_tokens(model: Any, inputs: Mapping[str, Any]) -> Bool[Tensor, " N"]:
    """Where the image stands in the one prompt of ``inputs``."""
    return (inputs["input_ids"][0] == adapter_of(model).image_token_id(model.config)).detach()


def blanked(embeds: Tensor, visual: Bool[Tensor, " N"], which: Tensor | None = None) -> Tensor:
    """Image embeddings (or those of ``which``) replaced by their mean."""
    out = embeds.clone()
    out[:, visual if which is None else which] = embeds[:, visual].mean(1, keepdim=True)
    return out


def _attention(model: Any, recorder: Recorder, row: int) -> Float[Tensor, " N"]:
    known = known_sinks(model.get_decoder().config)
    total: Tensor | None = None
    for layer, found in recorder.records.items():
        share = found.row(row).mean(0)
        if known is not None and layer in recorder.sinks:
            share = share.masked_fill(recorder.sinks[layer][:, list(known.dims)].abs().amax(-1) > TAU, 0.0)
        total = share if total is None else total + share
    assert total is not None
    return total / len(recorder.records)


def _rollout(_model: Any, recorder: Recorder, row: int) -> Float[Tensor, " N"]:
    records = list(recorder.records.values())
    vector = torch.zeros(records[0].q.shape[1], device=records[0].q.device)
    vector[row] = 1.0
    for found in reversed(records):
        added = torch.zeros_like(vector)
        for start, block in found.blocks():
            added += torch.einsum("b,hbn->n", vector[start : start + block.shape[1]], block) / block.shape[0]
        vector = (vector + added) / 2
    return vector


def _flow(_model: Any, recorder: Recorder, row: int) -> Float[Tensor, " N"]:
    return flow_row(list(recorder.records.values()), row)


def _chefer(
    model: Any,
    inputs: Mapping[str, Any],
    rows: Sequence[int],
    targets: Sequence[int],
    visual: Tensor,
    change: Callable[[Tensor], Tensor] | None,
) -> Float[Tensor, "R T"]:
    method = _Maps()
    with torch.enable_grad(), intervene(model, method), embeddings_changed(model, change):
        logits = model(**inputs, use_cache=False).logits
    found = []
    for row, target in zip(rows, targets, strict=True):
        gradients = torch.autograd.grad(logits[0, row, target], method.maps, retain_graph=True)
        vector = torch.zeros(logits.shape[1], device=logits.device)
        vector[row] = 1.0  # row of R, from the last layer down
        for p, gradient in zip(reversed(method.maps), reversed(gradients), strict=True):
            step = (p.detach() * gradient).clamp_min(0)[0].mean(0)
            vector = vector + vector @ step.to(vector.dtype)
        found.append(vector[visual])
    return torch.stack(found)


def _occlusion(
    model: Any,
    inputs: Mapping[str, Any],
    rows: Sequence[int],
    targets: Sequence[int],
    visual: Tensor,
    window: int,
    change: Callable[[Tensor], Tensor] | None,
) -> Float[Tensor, "R T"]:
    if window < 1:
        raise ValueError(f"explain: window must be at least 1, got window={window}")
    whole = log_probabilities(model, inputs, rows, targets, change)
    places = visual.nonzero().flatten()
    heat = torch.zeros(len(rows), len(places))
    for start in range(0, len(places), window):
        hidden = places[start : start + window]

        def hide(embeds: Tensor, hidden: Tensor = hidden) -> Tensor:
            return blanked(embeds if change is None else change(embeds), visual, hidden)

        heat[:, start : start + window] = (whole - log_probabilities(model, inputs, rows, targets, hide))[:, None]
    return heat


def log_probabilities(
    model: Any, inputs: Mapping[str, Any], rows: Sequence[int], targets: Sequence[int], change: Any
) -> Float[Tensor, " R"]:
    """Of the tokens ``targets`` at the outputs of ``rows``, under a change of the embeddings."""
    with torch.no_grad(), embeddings_changed(model, change):
        logits = model(**inputs, use_cache=False).logits[0].float().log_softmax(-1)
    return logits[list(rows), list(targets)].cpu()


def _integrated(
    model: Any,
    inputs: Mapping[str, Any],
    rows: Sequence[int],
    targets: Sequence[int],
    visual: Tensor,
    steps: int,
    change: Callable[[Tensor], Tensor] | None,
) -> Float[Tensor, "R T"]:
    if steps < 1:
        raise ValueError(f"explain: steps must be at least 1, got steps={steps}")
    total = torch.zeros(len(rows), int(visual.sum()))
    kept: dict[str, Tensor] = {}
    for step in range(steps):
        share = (step + 0.5) / steps

        def between(embeds: Tensor, share: float = share) -> Tensor:
            embeds = embeds.detach() if change is None else change(embeds.detach())
            base = blanked(embeds, visual)
            kept["difference"] = (embeds - base)[0, visual]
            kept["at"] = (base + share * (embeds - base)).requires_grad_(True)
            return kept["at"]

        with torch.enable_grad(), embeddings_changed(model, between):
            logits = model(**inputs, use_cache=False).logits[0].float().log_softmax(-1)
        for number, (row, target) in enumerate(zip(rows, targets, strict=True)):
            (gradient,) = torch.autograd.grad(logits[row, target], kept["at"], retain_graph=True)
            total[number] += (gradient[0, visual] * kept["difference"]).sum(-1).detach().cpu() / steps
    return total


def with_answer(inputs: Mapping[str, Any], answer: Int[Tensor, "1 A"]) -> dict[str, Any]:
    """The prompt with an answer behind it."""
    out = dict(inputs)
    count = answer.shape[1]
    out["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
    for name, filler in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", None)):
        if inputs.get(name) is not None:
            last = (
                inputs[name][:, -1:].expand(-1, count) if filler is None else inputs[name].new_full((1, count), filler)
            )
            out[name] = torch.cat([inputs[name], last], dim=1)
    return out


def on_picture(heat: Float[Tensor, " T"], boxes: Float[Tensor, "T 4"], size: tuple[int, int]) -> Float[Tensor, "Y X"]:
    """Relevance of image tokens painted on the picture: the mean over the boxes that show a pixel, 0 where none does.

    Args:
        boxes: as from an adapter, fractions of the picture; NaN for tokens that show none.
        size: height and width in pixels.

    Raises:
        ValueError: not as many boxes as tokens.
    """
    if len(heat) != len(boxes):
        raise ValueError(f"on_picture: {len(heat)} values need as many boxes, got {len(boxes)}")
    height, width = size
    total, count = torch.zeros(height, width), torch.zeros(height, width)
    for value, box in zip(heat.tolist(), boxes.tolist(), strict=True):
        if box[0] != box[0]:
            continue
        x0, y0, x1, y1 = round(box[0] * width), round(box[1] * height), round(box[2] * width), round(box[3] * height)
        total[y0:y1, x0:x1] += value
        count[y0:y1, x0:x1] += 1
    return total / count.clamp_min(1)
