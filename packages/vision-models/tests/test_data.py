"""Data sets and picture files: fixed parts, every color mode, every unusable input named in one line."""

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vision_models.data import Cifar, Digits, ImageFolder, Preprocess, read_image
from vision_models.data.repeated import RepeatedAugmentation
from vision_models.data.splits import stratified_parts


def test_digits_parts_are_fixed_disjoint_stratified_and_complete() -> None:
    parts = {split: Digits(split) for split in ("train", "val", "test")}  # type: ignore[arg-type]
    assert {split: len(part) for split, part in parts.items()} == {"train": 1259, "val": 179, "test": 359}
    rows = torch.cat([part.images.flatten(1) for part in parts.values()])
    assert len(rows) == 1797
    for part in parts.values():
        counts = np.bincount(part.labels, minlength=10) / len(part)
        assert counts.min() > 0.09
    # The first test labels, so that a change of the split cannot pass unseen.
    assert parts["test"].labels[:12] == [0, 1, 3, 6, 8, 9, 2, 4, 6, 9, 8, 5]


def test_digits_augmentation_follows_the_global_generator_and_stays_in_range() -> None:
    data = Digits("train", augment=True, elastic=0.3, contrast=0.5)
    torch.manual_seed(3)
    first = data[5]["image"]
    torch.manual_seed(3)
    assert torch.equal(data[5]["image"], first)
    assert not torch.equal(data[5]["image"], first)
    assert first.shape == (1, 32, 32)
    assert -1.001 <= first.min() < first.max() <= 1.001


@pytest.mark.parametrize("option", ["degrees", "shift", "scale", "shear", "elastic", "contrast"])
def test_each_augmentation_strength_moves_the_image(option: str) -> None:
    still = dict.fromkeys(("degrees", "shift", "scale", "shear", "elastic", "contrast"), 0.0)
    plain = Digits("train")[0]["image"]
    assert torch.allclose(Digits("train", augment=True, **still)[0]["image"], plain, atol=1e-5)
    moved = Digits("train", augment=True, **{**still, option: 20.0 if option == "degrees" else 0.4})[0]["image"]
    assert not torch.allclose(moved, plain, atol=1e-3)


def test_digits_as_a_file_become_the_same_network_input(tmp_path: Path) -> None:
    data = Digits("test")
    pixels = ((data.images[0, 0] + 1) / 2 * 255).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "digit.png")
    tensor = Preprocess(**data.metainfo["preprocess"]).read(tmp_path / "digit.png")[1]
    assert (tensor - data[0]["image"]).abs().max() < 0.02


@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.floats(0, 0.5), st.floats(0, 0.5))
def test_stratified_parts_hold_every_sample_once(labels: list[int], first: float, second: float) -> None:
    parts = stratified_parts(labels, (first, second), salt="x")
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))


# --- picture files ----------------------------------------------------------------------------------------------------


def saved(path: Path, array: Any, mode: str | None = None) -> Path:
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path)
    return path


GRADIENT = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)


def test_gray_becomes_equal_channels(tmp_path: Path) -> None:
    image = np.asarray(read_image(saved(tmp_path / "g.png", GRADIENT)))
    assert image.shape == (8, 8, 3)
    assert all((image[..., channel] == GRADIENT).all() for channel in range(3))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    path = saved(tmp_path / "d.png", GRADIENT.astype(np.uint16) * 257)
    assert (np.asarray(read_image(path, "L")) == GRADIENT).all()


def test_transparent_pixels_lie_on_white(tmp_path: Path) -> None:
    array = np.zeros((8, 8, 4), np.uint8)
    array[:4, :, 3] = 255
    image = np.asarray(read_image(saved(tmp_path / "a.png", array)))
    assert (image[:4] == 0).all()
    assert (image[4:] == 255).all()


def test_cmyk_and_palette_keep_their_colors(tmp_path: Path) -> None:
    red = np.full((16, 16, 3), (255, 0, 0), np.uint8)
    for name, mode in (("c.jpg", "CMYK"), ("p.png", "P")):
        image = np.asarray(read_image(saved(tmp_path / name, red, mode))).astype(int)
        assert abs(image - red).max() < 12, mode


def test_camera_orientation_is_followed(tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((8, 16, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (8, 16)


def test_float_pictures_are_unit_range_and_finite(tmp_path: Path) -> None:
    unit = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    assert np.asarray(read_image(saved(tmp_path / "f.tif", unit), "L")).max() == 255
    unit[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"nan.tif: 1 pixels are NaN or infinite"):
        read_image(saved(tmp_path / "nan.tif", unit))
    with pytest.raises(ValueError, match=r"pixels must lie in 0…1 for mode F"):
        read_image(saved(tmp_path / "wide.tif", np.full((8, 8), 7.0, np.float32)))


def test_unusable_files_are_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture")
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[:-200])
    saved(tmp_path / "dot.png", np.zeros((1, 1, 3), np.uint8))
    for name, message in {
        "empty.png": r"empty\.png: the file is empty \(0 bytes\)",
        "text.png": r"text\.png: not an image, or of an unknown format",
        "cut.jpg": r"cut\.jpg: the image is damaged",
        "dot.png": r"dot\.png: 1×1 pixels are too few",
        "absent.png": r"absent\.png: No such file",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(300, 200), (20, 400), (224, 224)])
def test_preprocessing_equals_the_training_library(size: tuple[int, int]) -> None:
    from timm.data.transforms_factory import create_transform

    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    ours = Preprocess(size=(64, 64), crop_pct=0.875)
    theirs: Any = create_transform(64, is_training=False, crop_pct=0.875, interpolation="bicubic")
    # timm floors the resized side, ours rounds: one pixel of scale at most
    assert (ours.to_tensor(ours.crop(image)) - theirs(image)).abs().mean() < 0.25


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "pictures" / label / "deeper").mkdir(parents=True)
        for i in range(3):
            array = generator.integers(0, 255, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(array).save(tmp_path / "pictures" / label / "deeper" / f"{i}.png")
    return tmp_path / "pictures"


def test_folder_names_are_the_classes(folder: Path) -> None:
    data = ImageFolder(folder, size=32)
    assert data.metainfo["classes"] == ["cat", "dog"]
    assert [data[i]["label"] for i in range(len(data))] == [0, 0, 0, 1, 1, 1]
    assert data[0]["image"].shape == (3, 32, 32)
    augmented = ImageFolder(folder, size=32, augment=True)
    assert augmented[0]["image"].shape == (3, 32, 32)
    assert not torch.equal(augmented[0]["image"], augmented[0]["image"])


def test_unusable_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent is not a folder; expected .*/<class>/<picture>"):
        ImageFolder(tmp_path / "absent")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"holds 0 class folder\(s\), training needs at least two"):
        ImageFolder(tmp_path / "bare")
    (tmp_path / "bare" / "cat").mkdir()
    with pytest.raises(ValueError, match=r"holds 1 class folder"):
        ImageFolder(tmp_path / "bare")
    (folder / "eel").mkdir()
    with pytest.raises(ValueError, match=r"eel holds no pictures"):
        ImageFolder(folder)
    (folder / "eel").rmdir()
    with pytest.raises(ValueError, match=r"unknown classes \['dog'\]"):
        ImageFolder(folder, classes=["cat", "cow"])
    with pytest.raises(ValueError, match=r"holds 2 classes, the model has 1000; --set classes=2"):
        ImageFolder(folder, num_classes=1000)


# --- CIFAR ------------------------------------------------------------------------------------------------------------


def archive(root: Path, classes: int, version: str, *, per_class: int = 10) -> None:
    """A small copy of the official archives' layout, as Python 2 or the binary version wrote it."""
    labels = np.arange(classes * per_class, dtype=np.uint8) % classes
    pixels = np.random.default_rng(0).integers(0, 255, (len(labels), 3072), dtype=np.uint8)
    names = [f"class{i}" for i in range(classes)]
    train = [f"data_batch_{i}" for i in range(1, 6)] if classes == 10 else ["train"]
    test = "test_batch" if classes == 10 else "test"
    key = b"labels" if classes == 10 else b"fine_labels"
    folder = (
        root
        / {
            (10, "python"): "cifar-10-batches-py",
            (10, "binary"): "cifar-10-batches-bin",
            (100, "python"): "cifar-100-python",
            (100, "binary"): "cifar-100-binary",
        }[classes, version]
    )
    folder.mkdir(parents=True)
    for name in [*train, test]:
        if version == "python":
            content = {b"data": pixels, key: labels.tolist()}
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        else:
            columns = [labels[:, None]] if classes == 10 else [labels[:, None] * 0, labels[:, None]]
            (folder / f"{name}.bin").write_bytes(np.concatenate([*columns, pixels], axis=1).tobytes())
    if version == "python":
        meta, meta_key = ("batches.meta", b"label_names") if classes == 10 else ("meta", b"fine_label_names")
        (folder / meta).write_bytes(pickle.dumps({meta_key: [n.encode() for n in names]}, protocol=2))
    else:
        text = "batches.meta.txt" if classes == 10 else "fine_label_names.txt"
        (folder / text).write_text("\n".join(names) + "\n")


@pytest.mark.parametrize("classes", [10, 100])
def test_both_versions_of_the_archive_give_the_same_images(classes: Any, tmp_path: Path) -> None:
    for version in ("python", "binary"):
        archive(tmp_path / version, classes, version)
    parts = [Cifar(tmp_path / version, "test", classes=classes) for version in ("python", "binary")]
    assert parts[0].metainfo == parts[1].metainfo
    assert parts[0].labels == parts[1].labels
    assert torch.equal(parts[0][3]["image"], parts[1][3]["image"])
    assert parts[0][0]["image"].shape == (3, 32, 32)
    train, val = (Cifar(tmp_path / "python", split, classes=classes) for split in ("train", "val"))  # type: ignore
    assert len(val) * 9 == len(train)
    enlarged = Cifar(tmp_path / "python", "train", classes=classes, size=64, augment=True)
    assert enlarged[0]["image"].shape == (3, 64, 64)


def test_archive_is_read_without_unpacking(tmp_path: Path) -> None:
    archive(tmp_path / "unpacked", 10, "python")
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "unpacked" / "cifar-10-batches-py", "cifar-10-batches-py")
    packed, plain = Cifar(tmp_path, "test"), Cifar(tmp_path / "unpacked", "test")
    assert torch.equal(packed[7]["image"], plain[7]["image"])


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code in a data file was run",))


def test_missing_and_damaged_archives_are_explained(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"holds neither cifar-10-batches-py/.*download it from https://.*--set data_root"
    ):
        Cifar(tmp_path)
    archive(tmp_path, 10, "python")
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"test_batch is not a CIFAR batch"):
        Cifar(tmp_path, "test")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(ValueError, match=r"lacks the file data_batch_3"):
        Cifar(tmp_path, "train")
    archive(tmp_path / "b", 10, "binary")
    (tmp_path / "b" / "cifar-10-batches-bin" / "test_batch.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"has 5 bytes, not a multiple of 3073"):
        Cifar(tmp_path / "b", "test")


def test_repeated_augmentation_serves_a_third_of_the_images_three_times() -> None:
    sampler = RepeatedAugmentation(list(range(30)), repeats=3, seed=0)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == 30
    assert sorted(np.unique(drawn, return_counts=True)[1].tolist()) == [3] * 10
    sampler.set_epoch(1)
    assert list(sampler) != drawn
    with pytest.raises(ValueError, match="repeats must be positive"):
        RepeatedAugmentation([1], repeats=0)
