"""Readers of features: every format, in pieces, and what is damaged or does not belong together, by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from medical_seg.slides.batches import padded
from medical_seg.slides.folder import find_slides, open_slides

RNG = np.random.default_rng(0)


def features(count: int = 7, channels: int = 4) -> np.ndarray:
    return RNG.normal(size=(count, channels)).astype(np.float32)


def places(count: int = 7) -> np.ndarray:
    return np.stack([np.arange(count), np.arange(count) // 3], 1) * 256


def write_h5(path: Path, **held: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, value in held.items():
            file[name] = value
    return path


def write_acmil(path: Path, slides: dict[str, tuple[np.ndarray, int]]) -> Path:
    with h5py.File(path, "w") as file:
        for name, (x, label) in slides.items():
            group = file.create_group(name)
            group["feat"] = x.astype(np.float16)
            group["coords"] = places(len(x))
            group.attrs["label"] = label
    return path


def test_every_format_gives_the_same_float32_features_and_coordinates(tmp_path: Path) -> None:
    x, at = features(), places()
    half = x.astype(np.float16).astype(np.float32)
    clam = write_h5(tmp_path / "clam/a.h5", features=x, coords=at)
    with h5py.File(clam, "a") as file:
        file["coords"].attrs.update({"patch_size": 256, "downsample": [2.0, 2.0], "level_dim": [500, 400]})
    trident = write_h5(tmp_path / "trident/b.h5", features=half[None].astype(np.float16), coords=at)
    with h5py.File(trident, "a") as file:
        file["coords"].attrs.update({"patch_size_level0": 512, "level0_width": 1000, "level0_height": 800})
    torch.save(torch.from_numpy(x), tmp_path / "c.pt")
    torch.save(torch.from_numpy(half).half(), tmp_path / "d.pt", _use_new_zipfile_serialization=False)
    np.savez_compressed(tmp_path / "e.npz", features=x, coords=at, label=1)
    write_acmil(tmp_path / "set.h5", {"f": (x, 1), "g": (x[:3], 0)})
    found = {slide.name: slide for slide in find_slides([tmp_path])}
    assert list(found) == ["a", "b", "c", "d", "e", "f", "g"]
    for name, expected in {"a": x, "b": half, "c": x, "d": half, "e": x, "f": half, "g": half[:3]}.items():
        slide = found[name]
        assert (slide.instances, slide.channels) == expected.shape
        read = slide.features()
        assert read.dtype == torch.float32
        assert torch.equal(read, torch.from_numpy(expected))
        assert [len(piece) for piece in slide.pieces(2)] == [2] * (len(expected) // 2) + [1]
        assert torch.equal(torch.cat(list(slide.pieces(2))), read)
        where = slide.coordinates()
        assert where is None if name in "cd" else np.array_equal(where, at[: len(expected)])  # type: ignore[arg-type]
    assert [found[name].side for name in "abe"] == [512, 512, None]
    assert [found[name].extent for name in "abe"] == [(1000, 800), (1000, 800), None]
    assert [found[name].label for name in "aefg"] == [None, "1", "1", "0"]


def test_opening_reads_no_features_and_reading_takes_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of tensors, which stay on disk, nor of HDF5: a data set of any size is opened in the memory of names."""
    torch.save(torch.zeros(50_000, 32), tmp_path / "big.pt")
    write_h5(tmp_path / "other.h5", features=np.zeros((1000, 32), np.float32))
    read: list[int] = []
    inner = h5py.Dataset.__getitem__

    def counting(self: Any, *arguments: Any) -> Any:
        value = inner(self, *arguments)
        read.append(np.size(value))
        return value

    monkeypatch.setattr(h5py.Dataset, "__getitem__", counting)
    slides = find_slides([tmp_path])
    assert sum(read) == 0
    assert len(next(iter(slides[0].pieces(100)))) == 100
    assert len(next(iter(slides[1].pieces(100)))) == 100
    assert sum(read) == 3200


def test_clam_s_two_folders_are_one_set_with_its_table(tmp_path: Path) -> None:
    for name, count in (("s1", 5), ("s2", 6)):
        x = features(count)
        write_h5(tmp_path / f"h5_files/{name}.h5", features=x, coords=places(count))
        (tmp_path / "pt_files").mkdir(exist_ok=True)
        torch.save(torch.from_numpy(x), tmp_path / f"pt_files/{name}.pt")
    torch.save(torch.from_numpy(features(4)), tmp_path / "pt_files/s3.pt")
    write_h5(tmp_path / "patches/s3.h5", coords=places(4))
    (tmp_path / "set.csv").write_text(
        "\ufeffcase_id;slide_id;label\np1;s1.svs;normal\np1;s2;tumor\np2;s3;tumor\np9;s9;tumor\n", encoding="utf-8"
    )
    found = open_slides([tmp_path])
    assert found.classes == ["normal", "tumor"]
    assert found.labels == {"s1": 0, "s2": 1, "s3": 1}
    assert found.cases == {"s1": "p1", "s2": "p1", "s3": "p2"}
    assert [slide.path.suffix for slide in found.slides] == [".h5", ".h5", ".pt"]
    assert np.array_equal(found.slides[2].coordinates(), places(4))  # type: ignore[arg-type]
    assert found.counted() == "normal 1, tumor 2"


def test_labels_are_numbered_in_numerical_order_and_merged(tmp_path: Path) -> None:
    write_acmil(tmp_path / "set.h5", {f"s{k}": (features(3), k) for k in (10, 2, 0, 1)})
    assert open_slides([tmp_path]).classes == ["0", "1", "2", "10"]
    merged = open_slides([tmp_path], merge=[["0", "1"], ["2", "10"]])
    assert merged.classes == ["0+1", "2+10"]
    assert merged.labels == {"s0": 0, "s1": 0, "s2": 1, "s10": 1}
    for groups, words in (([["0", "1"], ["2"]], "no group has the label '10'"), ([["0"], ["0", "1"]], "in two groups")):
        with pytest.raises(ValueError, match=words):
            open_slides([tmp_path], merge=groups)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: cut(write_h5(d / "x.h5", features=features())), r"x\.h5: not a readable HDF5 file"),
        (lambda d: (d / "x.h5").write_bytes(b""), r"x\.h5: not a readable HDF5 file"),
        (lambda d: (d / "x.pt").write_bytes(b"no"), r"x\.pt: not a tensor file that loads safely"),
        (lambda d: (torch.save(torch.zeros(99, 4), d / "x.pt"), cut(d / "x.pt")), r"x\.pt: not a tensor file"),
        (lambda d: (np.savez(d / "x.npz", features=features()), cut(d / "x.npz")), r"x\.npz: not a readable \.npz"),
        (lambda d: write_h5(d / "x.h5", other=features()), r"x\.h5: holds no features .*found other"),
        (lambda d: write_h5(d / "x.h5", features=np.zeros((0, 4))), r"x\.h5: has no instance"),
        (
            lambda d: write_h5(d / "x.h5", features=np.zeros((3, 4), int)),
            r"x\.h5: features must be floats \(N, C\), got int",
        ),
        (lambda d: write_h5(d / "x.h5", features=np.zeros((2, 3, 4))), r"got float64 \(2, 3, 4\)"),
        (
            lambda d: write_h5(d / "x.h5", features=features(5), coords=places(4)),
            r"x\.h5: has 5 instances and coordinates",
        ),
        (
            lambda d: write_h5(d / "x.h5", features=features(5, 6)),
            r"6 features an instance, .*good\.h5 has 4: .*encoders",
        ),
        (
            lambda d: torch.save(torch.zeros(3, 4), d / "good.pt"),
            r"'good' stands in .*, too with \(7, 4\) and \(3, 4\)",
        ),
        (lambda d: write_h5(d / "deep/good.h5", features=features()), r"'good' stands in .*good\.h5, too; give one"),
        (
            lambda d: (torch.save(torch.zeros(3, 4), d / "y.pt"), write_h5(d / "p/y.h5", coords=places(4))),
            r"y\.h5: 4 coordinates, .*y\.pt has 3 instances",
        ),
        (lambda d: write_acmil(d / "x.h5", {"s": (features(0), 1)}), r"x\.h5: slide 's' has no instance"),
        (lambda d: torch.save({"weights": torch.zeros(2, 2)}, d / "x.pt"), r"x\.pt: holds no features"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_by_name(spoil: Callable[[Path], Any], words: str, tmp_path: Path) -> None:
    write_h5(tmp_path / "good.h5", features=features(), coords=places())
    spoil(tmp_path)
    with pytest.raises(ValueError, match=words) as refused:
        find_slides([tmp_path])
    assert "\n" not in str(refused.value)


def test_features_that_are_not_finite_and_files_cut_later_are_refused_when_read(tmp_path: Path) -> None:
    x = features().astype(np.float16)
    x[5, 1] = np.inf  # what a sum beyond 65,504 leaves in half precision
    write_h5(tmp_path / "a.h5", features=x)
    (slide,) = find_slides([tmp_path])
    with pytest.raises(ValueError, match=r"a\.h5: slide 'a' holds features that are NaN or infinite"):
        slide.features()
    np.savez_compressed(tmp_path / "b.npz", features=features(900))
    slide = find_slides([tmp_path / "b.npz"])[0]
    content = bytearray((tmp_path / "b.npz").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "b.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"b\.npz: cannot be read"):
        slide.features()


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("slide_id\na\n", r"set\.csv: has no column label; there are slide_id"),
        ("slide_id,label\na,\n", r"row 2 has no label"),
        ("slide_id,label\n,x\n", r"row 2 has no slide"),
        ("slide_id,label\na,x\na,y\n", r"row 3 says another thing of slide 'a'"),
        ("slide_id,label\nq,x\n", r"names none of the 2 slides \(there 'q', here 'a'\)"),
        ("slide_id,label\na,0\nb,0\n", r"slides of one class, 0: at least two"),
        ("slide_id,label\na,1\nb,0\n", r"slide 'a' has the label '0', in .*set\.csv it is '1'"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_by_name(table: str, words: str, tmp_path: Path) -> None:
    write_acmil(tmp_path / "set.h5", {"a": (features(3), 0), "b": (features(3), 0 if "b,0" in table else 1)})
    (tmp_path / "set.csv").write_text(table)
    with pytest.raises(ValueError, match=words):
        open_slides([tmp_path], table=tmp_path / "set.csv")


def test_slides_without_label_are_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in "abc":
        write_h5(tmp_path / f"{name}.h5", features=features())
    with pytest.raises(ValueError, match=r"a\.h5: slide 'a' has no label; give a csv with --labels"):
        open_slides([tmp_path])
    (tmp_path / "t.csv").write_text("slide_id,label\na,0\nb,1\nz,1\n")
    assert set(open_slides([tmp_path]).labels) == {"a", "b"}
    assert "names no label of c; left out" in caplog.text
    assert "no features were found of slides in" in caplog.text
    (tmp_path / "u.csv").write_text("slide_id,label\n")
    with pytest.raises(ValueError, match=r"2 csv files name slides and labels \(t\.csv, u\.csv\)"):
        open_slides([tmp_path])


def test_batches_are_padded_with_a_mask() -> None:
    batch = padded([{"features": torch.ones(2, 3), "label": 1}, {"features": torch.ones(4, 3), "label": 0}])
    assert batch["features"].sum((1, 2)).tolist() == [6, 12]
    assert batch["mask"].tolist() == [[True, True, False, False], [True] * 4]
    assert batch["label"].tolist() == [1, 0]
