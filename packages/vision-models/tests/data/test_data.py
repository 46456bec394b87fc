"""Data sets and picture files: fixed parts, every color mode, every unusable input named in one line."""

import pickle
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from vision_models.data import Cifar, Digits, ImageFolder, Preprocess, read_image
from vision_models.data.corruptions import blur
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


def test_corrupted_digits_come_behind_the_images_as_they_are_and_keep_their_labels() -> None:
    plain, data = Digits("val"), Digits("val", corruptions=("noise", "contrast"))
    count = len(plain)
    assert len(data) == 3 * count
    for kind in range(3):
        item = data[kind * count + 5]
        assert (item["corruption"], item["label"]) == (kind, plain[5]["label"])
    assert torch.equal(data[5]["image"], plain[5]["image"])
    assert torch.equal(data[count + 5]["image"], Digits("val", corruptions=("noise",))[count + 5]["image"])
    low, high = data[2 * count + 5]["image"], plain[5]["image"]
    torch.testing.assert_close(low.std() / high.std(), torch.tensor(0.25))
    torch.testing.assert_close(low.mean(), high.mean())
    with pytest.raises(ValueError, match=r"corruptions must be among .*got 'fog'"):
        Digits("val", corruptions=("fog",))


def test_blur_spreads_a_point_as_a_gaussian_and_keeps_what_is_even() -> None:
    point = torch.zeros(1, 1, 33, 33)
    point[..., 16, 16] = 1
    spread = blur(point)[0, 0]
    places = torch.arange(33.0) - 16
    assert spread.sum().item() == pytest.approx(1)
    assert (spread.sum(0) * places.square()).sum().sqrt().item() == pytest.approx(0.09 * 33, rel=0.03)
    torch.testing.assert_close(spread, spread.T)
    torch.testing.assert_close(blur(torch.ones(1, 1, 9, 9)), torch.ones(1, 1, 9, 9))


def test_few_digits_hold_equally_many_of_each_and_more_hold_them_too() -> None:
    few, more = Digits(limit=200), Digits(limit=500)
    assert torch.bincount(torch.tensor(few.labels)).tolist() == [20] * 10
    assert torch.bincount(torch.tensor(more.labels)).tolist() == [50] * 10
    rows = {tuple(image.flatten().tolist()) for image in more.images}
    assert all(tuple(image.flatten().tolist()) in rows for image in few.images)
    for limit in (0, 205, 1250):
        with pytest.raises(ValueError, match=f"limit must be a multiple of 10 up to 12[0-9]0, got limit={limit}"):
            Digits(limit=limit)


@pytest.mark.parametrize("option", ["degrees", "shift", "scale", "shear", "elastic", "contrast"])
def test_each_augmentation_strength_moves_the_image(option: str) -> None:
    still: dict[str, Any] = dict.fromkeys(("degrees", "shift", "scale", "shear", "elastic", "contrast"), 0.0)
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


def test_parts_hold_at_least_so_many_of_each_class_as_long_as_one_is_left() -> None:
    labels = [0] * 20 + [1] * 3 + [2]
    for least, sizes in ((0, [2, 0, 0]), (1, [2, 1, 0]), (5, [5, 2, 0])):
        first, _ = stratified_parts(labels, (0.1,), salt="x", at_least=least)
        assert np.bincount(np.array(labels)[first], minlength=3).tolist() == sizes


def test_pictures_go_through_the_size_of_their_originals() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32), dtype=np.uint8))
    options: dict[str, Any] = {"mode": "L", "size": (16, 16), "mean": (0.5,), "std": (0.5,)}
    direct, through = (Preprocess(**options, through=size).crop(picture) for size in (None, (2, 2)))
    corners = np.asarray(through)[[0, 0, -1, -1], [0, -1, 0, -1]].reshape(2, 2)
    means = np.asarray(picture, dtype=float).reshape(2, 16, 2, 16).mean((1, 3))
    assert np.abs(corners - means).max() <= 1
    assert np.asarray(through).std() < 0.5 * np.asarray(direct).std()


# --- picture files ----------------------------------------------------------------------------------------------------


def saved(path: Path, array: Any, mode: str | None = None) -> Path:
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path)
    return path


GRADIENT = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)


def as_people_save_it(folder: Path) -> dict[str, Path]:
    """One grey gradient in the kinds of files that cameras, scanners and editors write."""
    turned = Image.fromarray(np.rot90(GRADIENT))
    exif = turned.getexif()
    exif[0x0112] = 6  # shown turned by 90° to the right
    turned.save(folder / "phone.png", exif=exif)
    alpha = np.stack([GRADIENT, np.full_like(GRADIENT, 255)], -1)
    return {
        "grey": saved(folder / "grey.png", GRADIENT),
        "upper case": saved(folder / "CAMERA.PNG", GRADIENT),
        "16 bits": saved(folder / "scan.png", GRADIENT.astype(np.uint16) * 257),
        "16 bits, big-endian": saved(folder / "scan.tif", (GRADIENT.astype(np.uint16) * 257).astype(">u2")),
        "float": saved(folder / "float.tif", GRADIENT.astype(np.float32) / 255),
        "color": saved(folder / "color.webp", np.stack([GRADIENT] * 3, -1)),
        "palette": saved(folder / "palette.gif", GRADIENT, "P"),
        "alpha": saved(folder / "alpha.png", alpha),
        "EXIF": folder / "phone.png",
    }


def test_one_picture_in_every_kind_of_file_is_one_network_input(tmp_path: Path) -> None:
    files = as_people_save_it(tmp_path)
    preprocess = Preprocess(size=(8, 8))
    expected = preprocess.read(files["grey"])[1]
    for kind, path in files.items():
        error = (preprocess.read(path)[1] - expected).abs().max()
        assert error < (0.1 if kind == "color" else 0.03), kind  # webp is lossy


def test_cmyk_keeps_its_colors_and_one_bit_its_levels(tmp_path: Path) -> None:
    red = np.full((16, 16, 3), (255, 0, 0), np.uint8)
    image = np.asarray(read_image(saved(tmp_path / "c.jpg", red, "CMYK"))).astype(int)
    assert abs(image - red).max() < 12
    bits = np.asarray(read_image(saved(tmp_path / "b.png", GRADIENT > 100), "L"))
    assert set(np.unique(bits)) == {0, 255}


def test_unusable_files_are_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture")
    saved(tmp_path / "counts.tif", np.full((8, 8), 70000, np.int32))
    for name in ("empty.png", "text.png", "counts.tif", "absent.png"):
        with pytest.raises(ValueError, match=rf"{name}: ") as caught:
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


def fill(root: Path, counts: dict[str, int], *, seed: int = 0) -> Path:
    """``root/<class>/deeper/<number>.png``, as many as ``counts`` says."""
    generator = np.random.default_rng(seed)
    for label, count in counts.items():
        (root / label / "deeper").mkdir(parents=True)
        for i in range(count):
            array = generator.integers(0, 255, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(array).save(root / label / "deeper" / f"{i}.png")
    return root


def test_class_folders_without_parts_are_cut_into_training_and_test(tmp_path: Path) -> None:
    fill(tmp_path, {"cat": 20, "dog": 8, "eel": 2})
    parts = {split: ImageFolder(tmp_path, split, size=32) for split in ("train", "test")}  # type: ignore[arg-type]
    paths = {split: {path for path, _ in part.samples} for split, part in parts.items()}
    assert not paths["train"] & paths["test"]
    assert len(paths["train"] | paths["test"]) == 30
    assert np.bincount([label for _, label in parts["test"].samples]).tolist() == [5, 2, 1]
    assert parts["train"].metainfo == parts["test"].metainfo
    assert parts["train"].metainfo["classes"] == ["cat", "dog", "eel"]
    fill(tmp_path / "more", {"cat": 3}, seed=1)
    for i, path in enumerate((tmp_path / "more").rglob("*.png")):
        path.rename(tmp_path / "cat" / f"new{i}.png")
    (tmp_path / "more" / "cat" / "deeper").rmdir()
    (tmp_path / "more" / "cat").rmdir()
    (tmp_path / "more").rmdir()
    grown = {path for path, _ in ImageFolder(tmp_path, "test", size=32).samples}
    assert len(paths["test"] - grown) <= 1  # new pictures hardly move old ones between the parts
    half = ImageFolder(tmp_path, "test", size=32, hold_out=0.5)
    assert len(half) > len(grown)


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "Test"), ("train", "valid", "test")])
def test_folders_of_parts_are_found_and_share_their_classes(names: tuple[str, ...], tmp_path: Path) -> None:
    for number, name in enumerate(names):
        fill(tmp_path / name, {"cat": 2 + number, "dog": 3 + number}, seed=number)
    train, test = ImageFolder(tmp_path, "train", size=32), ImageFolder(tmp_path, "test", size=32)
    assert (len(train), len(test)) == (5, 3 + 2 * len(names))
    assert train.metainfo["classes"] == test.metainfo["classes"] == ["cat", "dog"]
    if "val" in names or "valid" in names:
        assert len(ImageFolder(tmp_path, "val", size=32)) == 7
    else:
        with pytest.raises(ValueError, match="has no folder val; leave val_dataloader out"):
            ImageFolder(tmp_path, "val")


def test_parts_with_other_classes_are_refused_with_the_difference(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"circle": 2, "dreieck": 2, "square": 2})
    fill(tmp_path / "val", {"dreieck": 2, "square": 2, "zebra": 2})
    ImageFolder(tmp_path, "train")
    for split in ("val", "test"):
        message = r"differ in their classes: .*val has \['zebra'\], which training has not; .*val lacks \['circle'\]"
        with pytest.raises(ValueError, match=message):
            ImageFolder(tmp_path, split)  # type: ignore[arg-type]
    (tmp_path / "val" / "zebra").rename(tmp_path / "zebra")
    (tmp_path / "val" / "circle").mkdir()  # without pictures: nothing to test of this class
    assert [label for _, label in ImageFolder(tmp_path, "val").samples] == [1, 1, 2, 2]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    fill(tmp_path, {"bus": 4, "train": 4})
    for path in list((tmp_path / "train" / "deeper").iterdir()):
        path.rename(tmp_path / "train" / path.name)
    assert ImageFolder(tmp_path, "train").metainfo["classes"] == ["bus", "train"]


def test_augmentation_shows_other_parts_of_the_picture_each_time(tmp_path: Path) -> None:
    fill(tmp_path, {"cat": 3, "dog": 3})
    plain = ImageFolder(tmp_path, size=32)
    assert torch.equal(plain[0]["image"], plain[0]["image"])
    augmented = ImageFolder(tmp_path, size=32, augment=True, auto_augment=None, erasing=0.0)
    assert augmented[0]["image"].shape == (3, 32, 32)
    assert not torch.equal(augmented[0]["image"], augmented[0]["image"])


@pytest.mark.parametrize(("option", "value"), [("erasing", 1.0), ("auto_augment", "rand-m9-n4"), ("min_area", 1.0)])
def test_each_option_of_the_augmentation_changes_the_picture(option: str, value: Any, tmp_path: Path) -> None:
    fill(tmp_path, {"cat": 3, "dog": 3})
    options: dict[str, Any] = {"augment": True, "auto_augment": None, "erasing": 0.0, "size": 32}

    def drawn(**changed: Any) -> Tensor:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002  timm's augmentations draw from it
        data = ImageFolder(tmp_path, **{**options, **changed})
        return torch.stack([data[0]["image"] for _ in range(4)])

    assert torch.equal(drawn(), drawn())
    assert not torch.equal(drawn(), drawn(**{option: value}))


def test_pictures_kept_in_memory_are_read_once_and_look_the_same(tmp_path: Path) -> None:
    large = np.asarray(
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 12, 3), np.uint8)).resize((360, 270))
    )
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for i in range(2):
            saved(tmp_path / label / f"{i}.png", large)
    plain, kept = ImageFolder(tmp_path, size=32), ImageFolder(tmp_path, size=32, in_memory=True)
    assert (plain[0]["image"] - kept[0]["image"]).abs().mean() < 0.05
    assert next(iter(kept.kept.values())).size == (85, 64)
    for path, _ in kept.samples[:1]:
        path.unlink()
    assert torch.isfinite(kept[0]["image"]).all()


def test_unusable_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent is not a folder; expected .*/<class>/<picture>"):
        ImageFolder(tmp_path / "absent")
    bare = tmp_path / "bare"
    bare.mkdir()
    with pytest.raises(ValueError, match=r"holds 0 class folder\(s\), training needs at least two"):
        ImageFolder(bare)
    saved(bare / "a.png", GRADIENT)
    with pytest.raises(ValueError, match=r"holds 0 class folder\(s\) and 1 pictures beside them"):
        ImageFolder(bare)
    fill(tmp_path / "data", {"cat": 1, "dog": 1})
    with pytest.raises(ValueError, match=r"holds no pictures for the part 'test'; a class needs at least two"):
        ImageFolder(tmp_path / "data", "test")
    (tmp_path / "data" / "eel").mkdir()
    with pytest.raises(ValueError, match=r"eel holds no pictures"):
        ImageFolder(tmp_path / "data")
    with pytest.raises(ValueError, match=r"holds 3 classes, the model has 1000; --set classes=3"):
        ImageFolder(tmp_path / "data", num_classes=1000)
    with pytest.raises(ValueError, match="split must be 'train', 'val' or 'test', got split='dev'"):
        ImageFolder(tmp_path / "data", "dev")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hold_out must lie between 0 and 1, got hold_out=1"):
        ImageFolder(tmp_path / "data", hold_out=1)


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
    train, val = (Cifar(tmp_path / "python", split, classes=classes) for split in ("train", "val"))
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
