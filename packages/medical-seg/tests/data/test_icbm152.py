"""The brain of nilearn."""

import numpy as np
import pytest
import torch

from medical_seg.data.icbm152 import Icbm152, load_icbm152


def test_the_average_brain_is_symmetric_and_its_blocks_do_not_touch() -> None:
    image, label = load_icbm152()
    assert image.shape == (95, 117, 99)
    assert np.array_equal(image, image[:, :, ::-1])
    train, test = Icbm152("train"), Icbm152("test")
    assert train.label.shape[1] + 4 + test.label.shape[1] == label.shape[1]
    item = train[0]
    assert item["image"].shape == (1, 32, 32, 32)
    assert test[0]["label"].max() == 3
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got split='val'"):
        Icbm152("val")  # pyright: ignore[reportArgumentType]


def test_windows_set_the_length_and_augmentation_changes_what_is_drawn() -> None:
    plain = Icbm152("train", window=16, windows=3, augment=False)
    varied = Icbm152("train", window=16, windows=3, augment=True)
    assert len(plain) == 3
    items = []
    for data in (plain, varied):
        torch.manual_seed(0)
        items.append(data[0]["image"])
    assert items[0].shape == (1, 16, 16, 16)
    assert not torch.equal(*items)
