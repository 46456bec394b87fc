"""Sequences of tokens: the interpreter's own source as text, and tasks of memory generated from a seed.

Every item is ``{"input_ids": (N,) int64, "labels": (N,) int64}``; labels repeat the tokens that count and are −100
elsewhere (the models shift them). The same index of the same split always gives the same item, and no index of one
split is that of another. Nothing is downloaded.
"""

import itertools
import re
import string
import sys
import sysconfig
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from seq_models.data.documents import files_of, parts_of

IGNORED = -100  # a label that does not count, as everywhere in transformers
Split = Literal["train", "val", "test"]
SPLITS: dict[str, int] = {"train": 0, "val": 1, "test": 2}
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}


def checked(caller: str, split: str, **sizes: int) -> None:
    """Refuse an unknown split and sizes below 1."""
    if split not in SPLITS:
        raise ValueError(f"{caller}: split must be 'train', 'val' or 'test', got split={split!r}")
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{caller}: {name} must be at least 1, got {name}={value}")


@cache
def standard_library(split: Split) -> np.ndarray:
    """Bytes of the running interpreter's own ``*.py`` files, those of tests and installed packages left out.

    Files, in the order of their paths, belong to ``test``, ``val`` or ``train`` by the CRC-32 of their content (1, 1
    and 18 of 20), so that copies of a file stay together. The text depends on the version of Python.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    parts = []
    for path in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        if SKIPPED.isdisjoint(path.relative_to(root).parts[:-1]):
            content = path.read_bytes()
            if {0: "test", 1: "val"}.get(zlib.crc32(content) % 20, "train") == split:
                parts.append(content)
    return np.frombuffer(b"".join(parts), dtype=np.uint8)


def own_text(files: str | Path | Sequence[str | Path], split: Split) -> np.ndarray:
    """Bytes of your text, one document after the other: its last tenth is ``test``, the tenth before ``val``.

    Args:
        files: files, and folders, see `seq_models.data.documents`.

    Raises:
        ValueError: no files, a path that does not exist, a folder without text, or a line of JSON without text.
    """
    return np.frombuffer(b"".join(parts_of(files_of(files), SPLITS[split])), dtype=np.uint8)


class ByteText(Dataset[dict[str, Tensor]]):
    """Windows of ``length`` bytes of text, one after the other.

    Args:
        text: None is the interpreter's standard library; otherwise files of your own, see :func:`own_text`.
        limit: windows that are served, evenly spread; None is all of them.

    Raises:
        ValueError: unknown split, sizes below 1, as :func:`own_text`, or a part that is shorter than one window.
    """

    def __init__(
        self,
        split: Split = "train",
        *,
        length: int = 256,
        limit: int | None = None,
        text: str | Path | Sequence[str | Path] | None = None,
    ) -> None:
        checked("ByteText", split, length=length, **({} if limit is None else {"limit": limit}))
        data = standard_library(split) if text is None else own_text(text, split)
        windows = len(data) // length
        if windows == 0:
            raise ValueError(
                f"ByteText: the {split} part of the text has {len(data)} bytes, fewer than one window of {length}; "
                "give more text, or a shorter length"
            )
        self.windows = data[: windows * length].reshape(windows, length)
        if limit is not None and limit < windows:
            self.windows = self.windows[np.linspace(0, windows - 1, limit).astype(int)]
        source = "files of text" if text is not None else f"standard library of Python {sys.version.split()[0]}"
        self.metainfo: dict[str, Any] = {"task": "text", "source": source, "length": length}

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(self.windows[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}


def counted_bits(order: int, text: np.ndarray, windows: np.ndarray, strength: float = 4.0) -> float:
    """Bits per byte of windows under a table of counts: what a language model has to beat.

    p(byte | last k bytes) = (count of these k + 1 bytes in the text + s·p(byte | last k − 1)) / (count of the k bytes
    + s), from 1/256 without any context up to k = ``order``. As for the models, nothing stands before a window, and its
    first byte does not count.

    Args:
        order: 0, 1 or 2.
        text: bytes that are counted.
        windows: (W, N) bytes that are scored.
        strength: s, so many sightings weigh as much as the shorter context.

    Raises:
        ValueError: another order.
    """
    if order not in (0, 1, 2):
        raise ValueError(f"counted_bits: order must be 0, 1 or 2 (the table has 256^(order + 1) cells), got {order}")
    chance = np.full(windows[:, 1:].shape, 1 / 256)
    for k in range(order + 1):
        table = np.bincount(_codes(text[None], k)[0], minlength=256 ** (k + 1))
        seen = table.reshape(-1, 256).sum(1)
        code = _codes(windows, k)[:, 1 if k == 0 else 0 :]
        after = chance[:, max(k - 1, 0) :]
        after[:] = (table[code] + strength * after) / (seen[code >> 8] + strength)
    return float(-np.log2(chance).mean())


def _codes(text: np.ndarray, k: int) -> np.ndarray:
    """Each k + 1 neighboring bytes of rows as one number, the last byte lowest."""
    length = text.shape[1] - k
    return sum(text[:, i : i + length].astype(np.int64) << 8 * (k - i) for i in range(k + 1))  # pyright: ignore[reportReturnType]


class GeneratedTask(Dataset[dict[str, Tensor]], ABC):
    """Base of the generated tasks: ``size`` items, each from a generator of its own seeded by (seed, split, index)."""

    vocab_size: int

    def __init__(self, split: Split, size: int, length: int, seed: int, **sizes: int) -> None:
        checked(type(self).__name__, split, size=size, length=length, **sizes)
        self.split, self.size, self.length, self.seed = split, size, length, seed
        self.metainfo: dict[str, Any] = {"task": type(self).__name__, "length": length}

    @abstractmethod
    def item(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, and which of them count."""

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        ids, counted = self.item(np.random.default_rng((self.seed, SPLITS[self.split], index)))
        tokens = torch.from_numpy(ids)
        return {"input_ids": tokens, "labels": tokens.masked_fill(~torch.from_numpy(counted), IGNORED)}


class AssociativeRecall(GeneratedTask):
    """MQAR (Arora et al. 2023, arXiv 2312.04927): pairs of a key and its value, then each key again, in random order.

    A repeated key stands at a gap drawn from a power law; its value, which follows it, counts. Between them are tokens
    of no meaning (0). Keys are 1…V/2 − 1, values V/2…V − 1.

    Raises:
        ValueError: more pairs than keys, or than the length holds twice.
    """

    def __init__(
        self,
        split: Split = "train",
        *,
        length: int = 64,
        pairs: int = 8,
        vocab_size: int = 64,
        power: float = 0.01,
        size: int = 20000,
        seed: int = 0,
    ) -> None:
        super().__init__(split, size, length, seed, pairs=pairs)
        if pairs > vocab_size // 2 - 1:
            raise ValueError(
                f"AssociativeRecall: pairs must be at most the {vocab_size // 2 - 1} keys, got pairs={pairs}"
            )
        if length < 4 * pairs:
            raise ValueError(f"AssociativeRecall: length must be at least 4·pairs={4 * pairs}, got length={length}")
        self.pairs, self.vocab_size = pairs, vocab_size
        places = (length - 2 * pairs) // 2
        weight = np.arange(1, places + 1, dtype=np.float64) ** (power - 1)
        self.chance = weight / weight.sum()

    def item(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of key and value, then the keys again at places drawn by a power law; the values there count."""
        half, count = self.vocab_size // 2, self.pairs
        keys = rng.permutation(half - 1)[:count] + 1
        values = rng.integers(half, self.vocab_size, count)
        ids, counted = np.zeros(self.length, np.int64), np.zeros(self.length, bool)
        ids[0 : 2 * count : 2], ids[1 : 2 * count : 2] = keys, values
        place = 2 * count + 2 * rng.choice(len(self.chance), count, replace=False, p=self.chance)
        order = rng.permutation(count)
        ids[place], ids[place + 1] = keys[order], values[order]
        counted[place + 1] = True
        return ids, counted


class SelectiveCopy(GeneratedTask):
    """Tokens strewn among blanks (0), then a mark (1) and the tokens in order (Gu and Dao 2023, arXiv 2312.00752).

    Raises:
        ValueError: more tokens than the length holds twice with the mark, or fewer than one kind of token.
    """

    def __init__(
        self,
        split: Split = "train",
        *,
        length: int = 64,
        tokens: int = 8,
        vocab_size: int = 16,
        size: int = 20000,
        seed: int = 0,
    ) -> None:
        super().__init__(split, size, length, seed, tokens=tokens)
        if length < 2 * tokens + 1:
            raise ValueError(
                f"SelectiveCopy: length must be at least {2 * tokens + 1} for {tokens} tokens, got {length}"
            )
        if vocab_size < 3:
            raise ValueError(f"SelectiveCopy: vocab_size must be at least 3, got vocab_size={vocab_size}")
        self.tokens, self.vocab_size = tokens, vocab_size

    def item(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Tokens scattered over blanks, a mark, then the tokens in order; these count."""
        ids, counted = np.zeros(self.length, np.int64), np.zeros(self.length, bool)
        body = self.length - self.tokens - 1
        content = rng.integers(2, self.vocab_size, self.tokens)
        ids[np.sort(rng.choice(body, self.tokens, replace=False))] = content
        ids[body], ids[body + 1 :], counted[body + 1 :] = 1, content, True
        return ids, counted


FILLER = "Rain fell on the hills. A cart rolled past the mill. Nobody spoke of it. The river went on to the sea. "


class Passkey(GeneratedTask):
    """A number hidden in text that repeats itself, asked for at the end: the paper's test of landmark attention.

    The text is bytes: filler cut at a random place, a line that states the number twice, filler, and a question whose
    answer, the number, counts. The number has ``digits`` digits.

    Args:
        reminders: up to so many more times a text states the number, behind the line, as far as there is room. With
            any, every statement but the first counts, and not the answer alone: more to learn copying from.

    Raises:
        ValueError: a length that holds neither the line nor the question.
    """

    vocab_size = 256

    def __init__(
        self,
        split: Split = "train",
        *,
        length: int = 240,
        digits: int = 4,
        reminders: int = 0,
        size: int = 20000,
        seed: int = 0,
    ) -> None:
        super().__init__(split, size, length, seed, digits=digits)
        if reminders < 0:
            raise ValueError(f"{type(self).__name__}: reminders must not be negative, got reminders={reminders}")
        self.digits, self.reminders = digits, reminders
        self._ends("0" * digits)

    def _line(self, key: str) -> str:
        return f"The pass key is {key}. Remember {key}. "

    def _ends(self, key: str) -> str:
        question = f"What is the pass key? The pass key is {key}"
        shortest = len(self._line(key)) + len(question)
        if self.length < shortest:
            raise ValueError(
                f"{type(self).__name__}: length must be at least {shortest} for a key of {len(key)} characters, "
                f"got length={self.length}"
            )
        return question

    def secret(self, rng: np.random.Generator) -> str:
        """The answer."""
        return "".join(str(digit) for digit in rng.integers(0, 10, self.digits))

    def filler(self, rng: np.random.Generator, length: int) -> str:
        """Text without an answer."""
        begin = int(rng.integers(len(FILLER)))
        return (FILLER * (2 + length // len(FILLER)))[begin : begin + length]

    def item(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Filler with the key somewhere inside, and the question for it at the end; the answer counts."""
        key = self.secret(rng)
        line, question, reminder = self._line(key), self._ends(key), f"Remember {key}. "
        free = self.length - len(line) - len(question)
        count = int(rng.integers(min(self.reminders, free // len(reminder)) + 1)) if self.reminders else 0
        free -= count * len(reminder)
        text = self.filler(rng, free)
        cuts = [0, *np.sort(rng.integers(free + 1, size=1 + count)).tolist(), free]
        pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
        whole = pieces[0] + line + reminder.join(pieces[1:]) + question
        counted = np.zeros(self.length, bool)
        counted[-len(key) :] = True
        if self.reminders:
            for found in list(re.finditer(key, whole))[1:]:
                counted[found.start() : found.end()] = True
        return np.frombuffer(whole.encode(), np.uint8).astype(np.int64), counted


class Needle(Passkey):
    """As :class:`Passkey`, a word of letters among lines that state other words for other names, so that the text
    around the answer is not a give-away.
    """

    def _line(self, key: str) -> str:
        return f"The word of Ada is {key}. "

    def _ends(self, key: str) -> str:
        question = f"Tell me: the word of Ada is {key}"
        shortest = len(self._line(key)) + len(question)
        if self.length < shortest:
            raise ValueError(f"Needle: length must be at least {shortest}, got length={self.length}")
        return question

    def secret(self, rng: np.random.Generator) -> str:
        """A word of ``digits`` letters."""
        return "".join(string.ascii_lowercase[i] for i in rng.integers(0, 26, self.digits))

    def filler(self, rng: np.random.Generator, length: int) -> str:
        """``length`` characters of lines that look like the needle, with other names and words."""
        names = ("Bob", "Cid", "Dan", "Eve", "Fay", "Gus")
        lines = ""
        while len(lines) < length:
            lines += f"The word of {names[int(rng.integers(len(names)))]} is {self.secret(rng)}. "
        return lines[:length]
