"""Text in and out of a trained language model, and its bits per byte."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin

from attn_core.engine import TrainedRun
from seq_models.language.metrics import NATS_PER_BIT
from seq_models.language.task import TOKENIZER_FOLDER

WINDOW = 1024  # tokens that a file of text is scored in at a time
BYTES = 256


@dataclass(frozen=True)
class TextCodec:
    """Text as the numbers that a model knows: bytes, or tokens of the tokenizer in its run directory."""

    tokenizer: Any = None

    @property
    def end(self) -> int | None:
        """The token that ends a text; bytes have none."""
        return None if self.tokenizer is None else self.tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        """Numbers of a text; as bytes, what is no UTF-8 stays as it is."""
        if self.tokenizer is None:
            return list(text.encode(errors="surrogateescape"))
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, numbers: list[int]) -> str:
        """The text of numbers, up to the token of the end."""
        if self.tokenizer is None:
            return bytes(number for number in numbers if number < BYTES).decode(errors="replace")
        numbers = numbers[: numbers.index(self.end)] if self.end in numbers else numbers
        return self.tokenizer.decode(numbers)


def text_codec_of(run: TrainedRun) -> TextCodec:
    """Bytes, or the tokenizer that the run was trained with."""
    from seq_models.data.tokenizers import open_tokenizer

    folder = run.directory / TOKENIZER_FOLDER
    return TextCodec(open_tokenizer(folder)) if folder.is_dir() else TextCodec()


def language_model_of(run: TrainedRun) -> Any:
    """The network of a run.

    Raises:
        ValueError: it is no language model, or its vocabulary is not that of text.
    """
    net: Any = getattr(run.model, "net", None)
    if not isinstance(net, GenerationMixin):
        raise ValueError(f"{run.directory} holds no language model of text")
    known: int = net.config.vocab_size  # pyright: ignore[reportAttributeAccessIssue]
    if known < BYTES:
        raise ValueError(f"{run.directory} holds no language model of text: it knows {known} tokens, bytes are {BYTES}")
    return net


def bits_per_byte(run: TrainedRun, text: bytes, what: str) -> tuple[float, int]:
    """Mean −log₂ p of every byte but those of the first token, the state carried along the text.

    Returns:
        the mean, and the number of bytes that it is of.

    Raises:
        ValueError: fewer than two tokens; a run that holds no language model of text.
    """
    net, codec = language_model_of(run), text_codec_of(run)
    found = list(text) if codec.tokenizer is None else codec.encode(text.decode(errors="replace"))
    if len(found) < 2:
        raise ValueError(f"{what} holds {len(text)} bytes of text, too few: {len(found)} of the 2 tokens needed")
    counted = len(text) - (1 if codec.tokenizer is None else len(codec.decode(found[:1]).encode()))
    tokens = torch.tensor(found, device=run.device)
    state, nats = None, 0.0
    for start in range(0, len(tokens) - 1, WINDOW):
        piece = tokens[None, start : min(start + WINDOW, len(tokens) - 1)]
        output = net(piece, past_key_values=state, use_cache=True)
        state = output.past_key_values
        target = tokens[start + 1 : start + 1 + piece.shape[1]]
        nats += float(nn.functional.cross_entropy(output.logits[0].float(), target, reduction="sum"))
    return nats / counted / NATS_PER_BIT, counted
