"""Your own text as tokens of a tokenizer: made once, kept on disk, served in packed windows.

The text and its parts are those of `seq_models.data.language.own_text`, so that a model of tokens and one of bytes are
trained and tested on the same text, and their bits per byte stand beside one another.
"""

import contextlib
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from seq_models.data.documents import files_of, parts_of
from seq_models.data.language import SPLITS, Split, checked
from seq_models.data.tokenizers import fingerprint, open_tokenizer

BATCH = 256  # documents that the tokenizer gets at once


def cache_folder() -> Path:
    """Where tokens are kept: ``$XDG_CACHE_HOME/seq_models/tokens``, else below ``~/.cache``. It may be deleted."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seq_models" / "tokens"


class TokenText(Dataset[dict[str, Tensor]]):
    """Windows of ``length`` tokens of your own text, packed: behind the token that ends a document the next one begins.

    Items are ``{"input_ids": (length,) int64, "labels": (length,) int64}``. Tokens are kept in :func:`cache_folder`,
    two or four bytes each; a window is read when it is asked for, so memory does not grow with the text.

    Args:
        text: files and folders, see `seq_models.data.documents`.
        tokenizer: a ``tokenizer.json`` or a folder of Hugging Face's, see `seq_models.data.tokenizers`.
        limit: windows that are served, evenly spread; None is all of them.

    Raises:
        ValueError: unknown split, sizes below 1, no text, a file or tokenizer that cannot be read, or a part that is
            shorter than one window.
    """

    def __init__(
        self,
        split: Split = "train",
        *,
        text: str | Path | Sequence[str | Path],
        tokenizer: str | Path,
        length: int = 256,
        limit: int | None = None,
    ) -> None:
        checked("TokenText", split, length=length, **({} if limit is None else {"limit": limit}))
        self.tokens, ratio = _tokens(files_of(text), tokenizer, split)
        self.length, windows = length, len(self.tokens) // length
        if windows == 0:
            raise ValueError(
                f"TokenText: the {split} part of the text has {len(self.tokens)} tokens, fewer than one window of "
                f"{length}; give more text, or a shorter length"
            )
        served = windows if limit is None else min(limit, windows)
        self.starts = np.linspace(0, windows - 1, served).astype(np.int64) * length
        self.metainfo: dict[str, Any] = {"task": "text", "source": "files of text", "length": length}
        self.metainfo["bytes_per_token"] = ratio

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        begin = self.starts[index]
        ids = torch.from_numpy(self.tokens[begin : begin + self.length].astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}


def _tokens(files: list[Path], tokenizer: str | Path, split: Split) -> tuple[np.ndarray, float]:
    """All tokens of a part of the text, mapped from disk, and its bytes per token."""
    known = [(str(file.resolve()), (status := file.stat()).st_size, status.st_mtime_ns) for file in files]
    name = hashlib.sha256(json.dumps([known, fingerprint(tokenizer)]).encode()).hexdigest()[:24]
    place = cache_folder() / name / f"{split}.npy"
    about = place.with_suffix(".json")
    if not about.is_file():
        _write(parts_of(files, SPLITS[split]), tokenizer, place, about)
    sizes = json.loads(about.read_text(encoding="utf-8"))
    return np.load(place, mmap_mode="r"), sizes["bytes"] / max(sizes["tokens"], 1)


def _write(parts: Iterator[bytes], tokenizer: str | Path, place: Path, about: Path) -> None:
    """Tokens of all parts as one array in a file, whole or not at all; beside it what they were made of."""
    opened = open_tokenizer(tokenizer)
    kind = np.dtype(np.uint16 if len(opened) <= 2**16 else np.uint32)
    sizes = {"bytes": 0, "tokens": 0}
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=place.parent) as raw:
        while batch := list(itertools.islice(parts, BATCH)):
            words = [part.decode(errors="replace") for part in batch]
            for found in opened(words, add_special_tokens=False, return_attention_mask=False)["input_ids"]:
                ended = [*found, opened.eos_token_id]
                raw.write(np.asarray(ended, dtype=kind).tobytes())
                sizes["tokens"] += len(ended)
            sizes["bytes"] += sum(map(len, batch))
        raw.flush()
        tokens = np.memmap(raw, dtype=kind, mode="r") if sizes["tokens"] else np.zeros(0, kind)
        descriptor, partial = tempfile.mkstemp(dir=place.parent)
        try:
            with os.fdopen(descriptor, "wb") as out:
                np.save(out, tokens)
            Path(partial).replace(place)
        finally:
            with contextlib.suppress(FileNotFoundError):
                Path(partial).unlink()
    about.write_text(json.dumps(sizes), encoding="utf-8")
