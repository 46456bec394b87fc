"""Bags of scikit-learn's handwritten digits: a bag is positive if it holds a nine. Data that every installation has.

Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998 (CC BY 4.0), its test part.
A demonstration of learning from bags, no benchmark.
"""

import importlib.util
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

SIDE, LEVELS = 8, 16
NINE = 9
BAGS = {"train": 200, "val": 100, "test": 200}
SHARES = {"train": (0.0, 0.5), "val": (0.5, 0.65), "test": (0.65, 1.0)}  # of the images of each digit
SMALLEST, LARGEST = 30, 50  # instances of a bag
COLUMNS = 8  # of the picture that a bag is laid out in


class DigitBags(Dataset[dict[str, Any]]):
    """Bags of 30 to 50 digits; every second holds one or two nines, the others none.

    Training, validation and test share no image.

    Args:
        split: 200 bags of ``"train"``, 100 of ``"val"``, 200 of ``"test"``.
        fresh: draw a training bag anew from the training images whenever it is asked for; all other bags are always
            the same.

    Items: features (N, 64) float32 in [−1, 1], the pixels; label 0 or 1.
    Raises: ValueError if scikit-learn, which brings the images, is missing.
    """

    def __init__(self, split: Literal["train", "val", "test"], *, fresh: bool = True) -> None:
        if split not in BAGS:
            raise ValueError(f"DigitBags: split must be 'train', 'val' or 'test', got split={split!r}")
        images, digits = _load()
        begin, end = SHARES[split]
        rng = np.random.default_rng(0)  # the file is ordered by writer; a part holds some images of each
        parts = [rng.permutation(np.flatnonzero(digits == digit)) for digit in range(10)]
        parts = [part[round(begin * len(part)) : round(end * len(part))] for part in parts]
        self.nines, self.others = (
            torch.from_numpy(images[part]) for part in (parts[NINE], np.concatenate(parts[:NINE]))
        )
        self.fresh = fresh and split == "train"
        state = torch.Generator().manual_seed(list(BAGS).index(split))
        self.bags = [self._drawn(index, state) for index in range(BAGS[split])]
        self.metainfo: dict[str, Any] = {"classes": ["no nine", "nine"], "in_channels": SIDE**2}

    def __len__(self) -> int:
        return len(self.bags)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"features": self._drawn(index) if self.fresh else self.bags[index], "label": index % 2}

    def _drawn(self, index: int, state: torch.Generator | None = None) -> Tensor:
        """A bag: no instance twice, in random order; from torch's own state of chance, which the engine keeps."""
        size = int(torch.randint(SMALLEST, LARGEST + 1, (), generator=state))
        nines = (index % 2) * int(torch.randint(1, 3, (), generator=state))
        parts = [
            images[torch.randperm(len(images), generator=state)[:count]]
            for images, count in ((self.nines, nines), (self.others, size - nines))
        ]
        return torch.cat(parts)[torch.randperm(size, generator=state)]

    def place(self, index: int) -> tuple[str, np.ndarray, float]:
        """Name of a bag, upper left corners (N, 2) of its digits as X and Y, and their side."""
        at = np.arange(len(self.bags[index]))
        return f"bag {index}", np.stack([at % COLUMNS, at // COLUMNS], 1) * SIDE, float(SIDE)


def _load() -> tuple[np.ndarray, np.ndarray]:
    # scikit-learn is found, not imported: its file is all we need, and the import takes seconds.
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise ValueError("DigitBags: scikit-learn, which brings the digits, is not installed; "
                         "pip install 'medical-seg[demo]'")  # fmt: skip
    file = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if not file.is_file():
        raise ValueError(f"DigitBags: {file.name} is not in this installation of scikit-learn; install another version")
    table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    return table[:, :-1] / (LEVELS / 2) - 1, table[:, -1].astype(int)
