"""Random numbers as a function of (seed, where we are), so that nothing has to be saved and nothing can drift.

Generators are never carried along. Before each training step the global generators of Python, numpy and torch are
seeded from (seed, step, rank); before each data item from (seed, epoch, index). Hence a run that is resumed at step n,
with any number of loader workers, draws what the uninterrupted run drew, and the augmentation of an item does not
depend on the number of processes. Model initialization uses the plain seed, equal on all ranks.
"""

import hashlib
import random
import struct

import numpy as np
import torch

STEP, ITEM, VALIDATION = 1, 2, 3


def derive_seed(*parts: int) -> int:
    """A 63-bit seed that depends on every part; neighbors in any part give unrelated seeds."""
    digest = hashlib.blake2b(struct.pack(f">{len(parts)}q", *parts), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_generators(*parts: int) -> None:
    """Seed the global generators of Python, numpy and torch (every device in use) from the parts."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002  # data sets draw from the global one
    # Not torch.manual_seed: before CUDA is initialized it formats a stack trace on every call, 100 times slower.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
