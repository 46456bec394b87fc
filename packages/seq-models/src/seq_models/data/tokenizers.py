"""Tokenizers of Hugging Face, from a file or a folder; and how to make one of your own text."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seq_models.data.documents import documents, files_of

END = "<|endoftext|>"
PARTS = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.model", "*.tiktoken")


def open_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a ``tokenizer.json``, or of a folder that transformers wrote; nothing is downloaded.

    Returns:
        a ``PreTrainedTokenizerBase`` whose ``eos_token_id`` is set.

    Raises:
        ValueError: nothing there, no tokenizer, or one without a token that ends a text.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(source)
    if not path.exists():
        raise ValueError(f"tokenizer: {path} does not exist")
    try:
        if path.is_dir():
            found: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        else:
            found = PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # the library raises bare Exception, OSError, KeyError and more
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"tokenizer: {path} holds no tokenizer that transformers reads: {said}") from None
    if found.eos_token_id is None:
        known = found.get_vocab()
        ends = [token for token in (END, "</s>", "<|end_of_text|>", "<eos>", "[SEP]") if token in known]
        if not ends:
            raise ValueError(f"tokenizer: {path} names no token that ends a text (eos_token)")
        found.eos_token = ends[0]
    return found


def fingerprint(source: str | Path) -> str:
    """SHA-256 of the files that make a tokenizer."""
    path = Path(source)
    if not path.exists():
        raise ValueError(f"tokenizer: {path} does not exist")
    parts = sorted({file for part in PARTS for file in path.glob(part) if file.is_file()}) if path.is_dir() else [path]
    whole = hashlib.sha256()
    for file in parts:
        whole.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return whole.hexdigest()


def train_tokenizer(text: str | Path | Sequence[str | Path], vocab_size: int) -> Any:
    """A byte-level BPE of your own text, as GPT-2's; every text has tokens, and its bytes come back.

    Args:
        text: files and folders, see `seq_models.data.documents`.
        vocab_size: tokens at most, with the 256 bytes and the end of a text.

    Returns:
        a ``PreTrainedTokenizerFast``; ``save_pretrained(folder)`` writes it.

    Raises:
        ValueError: no text, or fewer tokens than 257.

    Source: Radford et al. 2019 (GPT-2), section 2.2; the library ``tokenizers``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 257:
        raise ValueError(f"train_tokenizer: vocab_size must be at least 257 (bytes and an end), got {vocab_size}")
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=vocab_size,  # pyright: ignore[reportCallIssue]
        special_tokens=[END],  # pyright: ignore[reportCallIssue]
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # pyright: ignore[reportCallIssue]
        show_progress=False,  # pyright: ignore[reportCallIssue]
    )
    words = (document.decode(errors="replace") for document in documents(files_of(text)))
    tokenizer.train_from_iterator(words, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, clean_up_tokenization_spaces=False)
