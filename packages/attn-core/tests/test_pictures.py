"""The picture reader: every kind of file keeps its levels, stands upright, or is refused by name."""

import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attn_core.pictures import CHANNELS, is_picture, read_mask, read_picture, to_eight_bits, whole_numbers

Image = pytest.importorskip("PIL.Image")
tifffile = pytest.importorskip("tifffile")

DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64")


def levels_of(dtype: str, channels: int, shape: tuple[int, int] = (5, 7)) -> np.ndarray:
    """Levels over the whole range of a dtype, in every byte of it."""
    count = shape[0] * shape[1] * channels
    if dtype.startswith("float"):
        values = np.linspace(-3.7, 900.3, count).astype(dtype)
    else:
        values = np.linspace(np.iinfo(dtype).min, np.iinfo(dtype).max, count).astype(dtype)
    return values.reshape(*shape, channels)


def write_png(path: Path, array: np.ndarray, bits: int, color: int, chunks: bytes = b"") -> Path:
    """A PNG written chunk by chunk: Pillow writes no 16-bit color and no grey of 2 or 4 bits."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = []
    for row in array:
        if bits == 16:
            rows.append(b"\0" + row.astype(">u2").tobytes())
        else:
            single = np.unpackbits(row.astype(np.uint8).reshape(-1, 1), axis=1)[:, 8 - bits :]
            rows.append(b"\0" + np.packbits(single).tobytes())
    head = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], bits, color, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunks + chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tiff_keeps_every_level_in_either_byte_order(
    dtype: str, channels: int, order: Any, planar: Any, tmp_path: Path
) -> None:
    levels = levels_of(dtype, channels)
    stored = levels[..., 0] if channels == 1 else levels if planar == "contig" else np.moveaxis(levels, 2, 0)
    options: dict[str, Any] = {"photometric": "rgb" if channels > 2 else "minisblack"}
    if channels > 1:
        options |= {"planarconfig": planar} | ({"extrasamples": ["unassalpha"]} if channels in (2, 4) else {})
    tifffile.imwrite(tmp_path / "x.TIF", stored, byteorder=order, **options)
    picture = read_picture(tmp_path / "x.TIF")
    assert picture.levels.dtype == np.dtype(dtype)
    assert picture.levels.dtype.isnative
    assert np.array_equal(picture.levels, levels)
    assert picture.channels == CHANNELS[channels]


@pytest.mark.parametrize(("channels", "color"), [(1, 0), (3, 2), (2, 4), (4, 6)])
def test_a_png_of_16_bits_keeps_every_level(channels: int, color: int, tmp_path: Path) -> None:
    levels = levels_of("uint16", channels)
    picture = read_picture(write_png(tmp_path / "x.png", levels, 16, color))
    assert picture.levels.dtype == np.uint16
    if channels == 2:  # OpenCV hands grey with alpha out as color
        assert np.array_equal(picture.levels[..., :3], levels[..., [0, 0, 0]])
        assert np.array_equal(picture.levels[..., 3], levels[..., 1])
    else:
        assert np.array_equal(picture.levels, levels)


@pytest.mark.parametrize("module", ["cv2", "tifffile"])
def test_without_a_library_that_keeps_them_levels_are_refused_by_name(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = levels_of("uint16", 3)
    write_png(tmp_path / "x.png", levels, 16, 2)
    tifffile.imwrite(tmp_path / "x.tif", levels, photometric="rgb")
    monkeypatch.setitem(sys.modules, module, None)
    file = {"cv2": "x.png", "tifffile": "x.tif"}[module]
    with pytest.raises(ValueError, match=rf"{file}: Pillow would drop levels of this kind; pip install \S+, which"):
        read_picture(tmp_path / file)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tif", "zip.tif", "rgb16.png", "float64.tif"])
def test_a_turned_picture_and_its_mask_stand_upright_alike(orientation: int, kind: str, tmp_path: Path) -> None:
    from PIL import ImageOps

    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    turned = Image.fromarray(grey)
    exif = turned.getexif()
    exif[274] = orientation
    expected = np.asarray(ImageOps.exif_transpose(_with_exif(grey, exif)))
    file = tmp_path / f"x.{kind}"
    if kind == "png":
        turned.save(file, exif=exif)
    elif kind.endswith("tif"):
        stored = grey.astype(np.float64) if kind.startswith("float") else grey
        packed = {"compression": "zlib"} if kind.startswith("zip") else {}
        tifffile.imwrite(file, stored, extratags=[(274, 3, 1, orientation, True)], **packed)
    else:
        body = b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 274, 3, 1, orientation, 0) + b"\0\0\0\0"
        chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
        write_png(file, np.repeat(grey[..., None], 3, 2), 16, 2, chunk)
    assert np.array_equal(read_picture(file).levels[..., 0], expected)
    assert np.array_equal(read_mask(file), expected)


def _with_exif(grey: np.ndarray, exif: Any) -> Any:
    import io

    held = io.BytesIO()
    Image.fromarray(grey).save(held, "PNG", exif=exif)
    return Image.open(held)


def test_a_palette_is_colors_to_a_picture_and_indices_to_a_mask(tmp_path: Path) -> None:
    indices = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    image = Image.new("P", (3, 2))
    image.putdata(indices.ravel().tolist())
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 0, 250])
    for bits, name in ((8, "a.png"), (2, "b.PNG"), (8, "c.bmp"), (8, "d.gif"), (8, "e.tif")):
        image.save(tmp_path / name, **({"bits": bits} if name.lower().endswith("png") else {}))
        assert read_picture(tmp_path / name).levels[0].tolist() == [[10, 20, 30], [200, 0, 0], [0, 0, 250]], name
        assert np.array_equal(read_mask(tmp_path / name), indices), name
    image.save(tmp_path / "t.png", transparency=1)
    assert read_picture(tmp_path / "t.png").levels[0, 1].tolist() == [200, 0, 0, 0]
    assert np.array_equal(read_mask(tmp_path / "t.png"), indices)


@pytest.mark.parametrize(("bits", "spread"), [(1, 255), (2, 85), (4, 17)])
def test_grey_of_few_bits_spreads_in_a_picture_and_stays_class_numbers_in_a_mask(
    bits: int, spread: int, tmp_path: Path
) -> None:
    numbers = np.arange(24).reshape(3, 8) % 2**bits
    file = write_png(tmp_path / "x.png", numbers, bits, 0)
    assert np.array_equal(read_picture(file).levels[..., 0], numbers * spread)
    assert np.array_equal(read_mask(file), numbers)


def test_cmyk_and_friends_become_rgb_and_alpha_stays(tmp_path: Path) -> None:
    rgb = np.zeros((32, 32, 3), np.uint8)
    rgb[:, 16:] = (250, 120, 10)
    for mode, name in (("CMYK", "a.tif"), ("CMYK", "b.jpg"), ("YCbCr", "c.jpg")):
        Image.fromarray(rgb).convert(mode).save(tmp_path / name)
        picture = read_picture(tmp_path / name)
        assert picture.channels == ("red", "green", "blue")
        assert np.abs(picture.levels.astype(int) - rgb).mean() < 5, name  # JPEG blurs the edge
    grey = np.array([[0, 100, 200]], np.uint8)
    alpha = np.array([[255, 0, 51]], np.uint8)
    Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]).save(tmp_path / "la.png")
    picture = read_picture(tmp_path / "la.png")
    assert np.array_equal(picture.levels, np.stack([grey, alpha], -1))
    assert picture.grey().tolist() == [[0, 255, 244]]  # 200 at a fifth on white: 40 + 204
    Image.fromarray(grey).save(tmp_path / "trns.png", transparency=100)
    assert read_picture(tmp_path / "trns.png").levels[..., 1].tolist() == [[255, 0, 255]]


def test_eight_bits_follow_from_the_dtype_alone() -> None:
    assert to_eight_bits(np.array([0, 128, 257, 65535], np.uint16)).tolist() == [0, 0, 1, 255]
    assert to_eight_bits(np.array([0, 0.5, 1], np.float32)).tolist() == [0, 128, 255]
    assert to_eight_bits(np.array([3, 255], np.uint8)).tolist() == [3, 255]
    assert to_eight_bits(np.array([-2000, -1000, 0, 5000], np.int16), limits=(-1000, 0)).tolist() == [0, 0, 255, 255]
    for levels, message in (
        (np.array([0, 7], np.int16), "levels 0 to 7 of type int16 say not which is white; save it with 8 or 16"),
        (np.array([0, 7], np.uint32), "levels 0 to 7 of type uint32"),
        (
            np.array([0, 200.0]),
            r"float64 must lie in \[0, 1\], got 0 to 200; .* or give limits=",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            to_eight_bits(levels)
    with pytest.raises(ValueError, match=r"limits must be two finite numbers, the smaller first, got \(1, 1\)"):
        to_eight_bits(np.zeros(2), limits=(1, 1))


def test_colors_and_grey_are_those_of_pillow(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (9, 11, 3)).astype(np.uint8)
    Image.fromarray(rgb).save(tmp_path / "x.png")
    picture = read_picture(tmp_path / "x.png")
    assert np.array_equal(picture.rgb(), rgb)
    assert np.array_equal(picture.grey(), np.asarray(Image.fromarray(rgb).convert("L")))
    Image.fromarray(rgb[..., 0]).save(tmp_path / "y.png")
    assert np.array_equal(read_picture(tmp_path / "y.png").rgb(), rgb[..., [0, 0, 0]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: None, "No such file"),
        (lambda p: p.mkdir(), "is a folder, not a picture"),
        (lambda p: p.touch(), r"the file is empty \(0 bytes\)"),
        (lambda p: p.write_text("no picture"), "not a picture, or of an unknown format"),
        (lambda p: __import__("os").mkfifo(p), "is not a regular file"),
        (lambda p: tifffile.imwrite(p, np.zeros((3, 4, 5), np.uint8), photometric="minisblack"), "holds 3 pages"),
        (lambda p: tifffile.imwrite(p, np.full((4, 4), np.nan, np.float32)), "16 levels are NaN or infinite"),
        (
            lambda p: tifffile.imwrite(p, np.zeros((4, 4), np.complex64)),
            "an array of complex64 and shape .* is no picture",
        ),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line_with_its_name(make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path / "scan 1.png")
    with pytest.raises(ValueError, match=rf"scan 1\.png: {message}") as caught:
        read_picture(tmp_path / "scan 1.png")
    assert "\n" not in str(caught.value)


def test_masks_that_hold_no_class_numbers_are_refused(tmp_path: Path) -> None:
    color = np.zeros((8, 8, 3), np.uint8)
    color[:, :4, 0] = 200
    Image.fromarray(color).save(tmp_path / "color.png")
    Image.fromarray(color[..., 0]).save(tmp_path / "grey.jpg")
    Image.fromarray(np.dstack([color, color[..., :1]])).save(tmp_path / "alpha.png")
    tifffile.imwrite(tmp_path / "half.tif", np.full((4, 4), 0.5, np.float32))
    tifffile.imwrite(tmp_path / "white.tif", np.zeros((4, 4), np.uint8), photometric="miniswhite")
    for name, message in (
        ("color.png", "a mask in colors"),
        ("grey.jpg", "JPEG changes class numbers"),
        ("alpha.png", "parts are transparent"),
        ("half.tif", "labels are not integers, found 0.5"),
        ("white.tif", "grey is stored inverted"),
    ):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            read_mask(tmp_path / name)
    Image.fromarray(np.repeat(color[..., :1] // 100, 3, 2)).save(tmp_path / "rgb.png")
    assert np.unique(read_mask(tmp_path / "rgb.png")).tolist() == [0, 2]


def test_class_numbers_may_be_stored_as_floats() -> None:
    assert whole_numbers(np.array([0.99999994, 2.0000002, 0.0], np.float32), "x").tolist() == [1, 2, 0]
    assert whole_numbers(np.array([True, False]), "x").tolist() == [1, 0]
    for value, message in (
        (np.nan, "NaN or infinity"),
        (1.01, "not integers, found 1.01"),
        (1e30, "is no class number"),
    ):
        with pytest.raises(ValueError, match=f"m.tif: .*{message}"):
            whole_numbers(np.array([0.0, value]), "m.tif")


def test_names_of_pictures_count_in_any_case() -> None:
    assert is_picture(Path("a/IMG_1.JPG"))
    assert is_picture(Path("b.TiFf"))
    assert not is_picture(Path(".hidden.png"))
    assert not is_picture(Path("labels.csv"))


def test_odd_exif_does_not_refuse_a_picture(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(
        tmp_path / "x.jpg", exif=b"Exif\0\0rubbish that is no TIFF head"
    )
    assert read_picture(tmp_path / "x.jpg").levels.shape == (8, 8, 3)


@pytest.fixture(scope="module")
def good_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("good")
    rgb = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    for name in ("a.png", "a.jpg", "a.bmp", "a.gif", "a.ppm", "a.tif"):
        Image.fromarray(rgb).save(folder / name)
    tifffile.imwrite(folder / "f64.tif", rgb.astype(float), photometric="rgb")
    write_png(folder / "rgb16.png", rgb.astype(int) * 200, 16, 2)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_read_or_refused_in_one_line(
    data: st.DataObject, good_files: dict[str, bytes], tmp_path: Path
) -> None:
    name = data.draw(st.sampled_from(sorted(good_files)))
    content = bytearray(good_files[name])
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(1, len(content))) :]
    (tmp_path / name).write_bytes(content)
    for read in (read_picture, read_mask):
        said = refusal(read, tmp_path / name)
        assert said is None or (said.startswith(f"{tmp_path / name}: ") and "\n" not in said)


def refusal(read: Any, path: Path) -> str | None:
    try:
        read(path)
    except ValueError as error:
        return str(error)
    return None


def test_importing_the_core_loads_neither_the_reader_nor_pillow() -> None:
    code = "import sys, attn_core; print([m for m in ('PIL', 'attn_core.pictures', 'cv2') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8")
    assert found.stdout.strip() == "[]"


def test_without_pillow_one_line_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ValueError, match=r"x\.png: pictures need Pillow; pip install 'attn-core\[pictures\]'"):
        read_picture(tmp_path / "x.png")
