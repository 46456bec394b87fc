"""Bits per byte of a text under a trained language model."""

from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin

from attn_core.engine import TrainedRun
from seq_models.language.metrics import NATS_PER_BIT

WINDOW = 1024  # tokens that a file of text is scored in at a time


def language_model_of(run: TrainedRun) -> Any:
    """The network of a run.

    Raises:
        ValueError: it is no language model, or its vocabulary is not that of bytes.
    """
    net: Any = getattr(run.model, "net", None)
    if not isinstance(net, GenerationMixin):
        raise ValueError(f"{run.directory} holds no language model of bytes")
    if net.config.vocab_size < 256:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(
            f"{run.directory} holds no language model of bytes: it knows {net.config.vocab_size} tokens, bytes are 256"  # pyright: ignore[reportAttributeAccessIssue]
        )
    return net


def bits_per_byte(run: TrainedRun, text: bytes, what: str) -> tuple[float, int]:
    """Mean −log₂ p of every byte but the first, the state carried along the text.

    Raises:
        ValueError: fewer than two bytes; a run that holds no language model of bytes.
    """
    net = language_model_of(run)
    if len(text) < 2:
        raise ValueError(f"{what} holds {len(text)} bytes of text, needs at least 2")
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().to(run.device)
    state, nats = None, 0.0
    for start in range(0, len(tokens) - 1, WINDOW):
        piece = tokens[None, start : min(start + WINDOW, len(tokens) - 1)]
        output = net(piece, past_key_values=state, use_cache=True)
        state = output.past_key_values
        target = tokens[start + 1 : start + 1 + piece.shape[1]]
        nats += float(nn.functional.cross_entropy(output.logits[0].float(), target, reduction="sum"))
    return nats / (len(tokens) - 1) / NATS_PER_BIT, len(tokens) - 1
