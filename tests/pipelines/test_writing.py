import errno
import io
import json
import os
import shutil
import struct
import sys
import threading
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from gspn2_diffusers.pipelines import writing
from gspn2_diffusers.pipelines.writing import check_writable, open_image, read_metadata

SIZES = [(1, 1), (1, 300), (300, 1), (37, 53), (512, 512), (700, 1100), (1025, 513)]
METADATA = {"prompt": "a lake — «dawn»\nsecond line", "seed": "7", "empty": ""}


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 pixels, smooth on the left and noise on the right."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    smooth = np.add.outer(np.arange(height), np.arange(width))[..., None] % 256
    return np.where(np.arange(width)[:, None] < width // 2, smooth, noise).astype(np.uint8)


def write(path, pixels: np.ndarray, rows=(64,), metadata=None) -> writing.ImageWriter:
    """Write in bands whose numbers of rows repeat `rows`."""
    with open_image(path, *pixels.shape[:2], metadata) as writer:
        start = 0
        while start < len(pixels):
            for count in rows:
                writer.write(pixels[start : start + count])
                start = min(start + count, len(pixels))
    return writer


def halved(pixels: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels; a last odd row or column counts twice."""
    height, width = pixels.shape[:2]
    even = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return even.reshape(even.shape[0] // 2, 2, even.shape[1] // 2, 2, 3).mean((1, 3))


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture
def small_pyramids(monkeypatch):
    """Pyramids of several levels, in tiles smaller than a level, of pictures that are quick."""
    monkeypatch.setattr(writing, "TILE", 32)
    monkeypatch.setattr(writing, "SMALLEST", 16)


@pytest.fixture
def small_blocks(monkeypatch):
    """PNGs in blocks of a few rows."""
    monkeypatch.setattr(writing, "_PNG_BLOCK", 1000)


def chunks(path) -> list[tuple[bytes, bytes]]:
    """Names and data of a PNG's chunks, whose checksums are verified."""
    data, found = path.read_bytes(), []
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    data = data[8:]
    while data:
        length, name = struct.unpack(">I4s", data[:8])
        content, checksum = data[8 : 8 + length], data[8 + length : 12 + length]
        assert checksum == struct.pack(">I", zlib.crc32(name + content))
        found.append((name, content))
        data = data[12 + length :]
    return found


def filtered(path) -> np.ndarray:
    """What the single zlib stream of a PNG of colours holds, whose checksum is verified: uint8
    ``[height, 1 + 3 * width]``, filters' numbers first."""
    found = chunks(path)
    width, height = struct.unpack(">2I", found[0][1][:8])
    stream = zlib.decompressobj()
    data = stream.decompress(b"".join(content for name, content in found if name == b"IDAT"))
    assert stream.eof and not stream.unused_data
    return np.frombuffer(data, np.uint8).reshape(height, 1 + 3 * width)


def predicted(number: int, left: int, above: int, above_left: int) -> int:
    """By a PNG's filter, as the specification writes it."""
    estimate = left + above - above_left
    nearest = min((left, above, above_left), key=lambda value: abs(estimate - value))
    return (0, left, above, (left + above) // 2, nearest)[number]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("suffix", [".png", ".tif", ".TIFF"])
def test_pixels_come_back_as_they_were_written(tmp_path, suffix, size):
    pixels = picture(*size)
    write(tmp_path / f"a{suffix}", pixels)
    assert np.array_equal(read(tmp_path / f"a{suffix}"), pixels)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("rows", [(1,), (7, 1, 40), (31, 33), (200,)], ids=str)
def test_bands_may_have_any_number_of_rows(tmp_path, small_pyramids, small_blocks, suffix, rows):
    pixels = picture(101, 77)
    writer = write(tmp_path / f"a{suffix}", pixels, rows)
    assert np.array_equal(read(tmp_path / f"a{suffix}"), pixels)
    whole = write(tmp_path / f"b{suffix}", pixels, (101,))
    assert np.array_equal(writer.preview(16), whole.preview(16))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["mixed", "constant", "noise"])
def test_a_png_is_valid_to_the_last_byte(tmp_path, small_blocks, kind, size):
    pixels = picture(size[0], 2 * size[1])
    pixels = pixels[:, size[1] :] if kind == "noise" else pixels[:, : size[1]]
    if kind == "constant":
        pixels = np.full_like(pixels, 200)
    path = tmp_path / "a.png"
    write(path, pixels, (13,), METADATA)
    names = [name for name, _ in chunks(path)]
    assert [name for name in names if name != b"IDAT"] == [
        b"IHDR", b"iTXt", b"tEXt", b"tEXt", b"IEND",
    ]  # fmt: skip
    assert names.index(b"IDAT") == 4 and names[-2] == b"IDAT"
    assert chunks(path)[0][1] == struct.pack(">2I5B", *size[::-1], 8, 2, 0, 0, 0)
    assert filtered(path)[:, 0].max() <= 4
    assert np.array_equal(read(path), pixels)


def test_every_row_of_a_png_takes_the_filter_that_suits_it(tmp_path, small_blocks):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (10, 100, 3), dtype=np.uint8)
    for number, (above, row) in enumerate(zip(pixels[::2], pixels[1::2], strict=True)):
        # Below a row of noise, one that only this filter predicts.
        error = rng.integers(-2, 3, row.shape)
        for x, channel in np.ndindex(row.shape):
            left, above_left = (int(line[x - 1, channel]) if x else 0 for line in (row, above))
            value = predicted(number, left, int(above[x, channel]), above_left)
            row[x, channel] = (value + error[x, channel]) % 256
    write(tmp_path / "a.png", pixels)
    assert filtered(tmp_path / "a.png")[1::2, 0].tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(read(tmp_path / "a.png"), pixels)


def test_paeths_predictor_is_that_of_the_specification():
    values = np.array([0, 1, 2, 3, 5, 50, 99, 100, 101, 127, 128, 200, 253, 254, 255], np.uint8)
    triples = np.stack(np.meshgrid(values, values, values)).reshape(3, -1)
    expected = [predicted(4, *(int(value) for value in triple)) for triple in triples.T]
    assert writing._paeth(*triples).tolist() == expected


def test_a_png_is_hardly_larger_than_pillows(tmp_path):
    y, x, _ = np.ogrid[:256, :256, :3]
    noise = np.random.default_rng(0).normal(0, 2, (256, 256, 3))
    pixels = (128 + 60 * np.sin(x / 40) * np.cos(y / 30) + noise).astype(np.uint8)
    write(tmp_path / "a.png", pixels)
    Image.fromarray(pixels).save(tmp_path / "pillow.png", compress_level=1)
    assert (tmp_path / "a.png").stat().st_size < 1.02 * (tmp_path / "pillow.png").stat().st_size


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp"])
def test_lossy_formats_hold_nearly_the_same_picture(tmp_path, suffix):
    pixels = np.repeat(np.repeat(picture(4, 6), 16, axis=0), 16, axis=1)
    write(tmp_path / f"a{suffix}", pixels)
    difference = read(tmp_path / f"a{suffix}").astype(int) - pixels
    assert difference.shape == (64, 96, 3) and np.abs(difference).mean() < 4


def test_a_tiff_is_big_tiled_deflated_and_streams_its_rows(tmp_path):
    write(tmp_path / "a.tif", picture(700, 1100), (100,))
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        (page,) = file.pages
        assert file.is_bigtiff and page.tile == (512, 512)
        assert page.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
        assert page.predictor == tifffile.PREDICTOR.HORIZONTAL
        assert page.photometric == tifffile.PHOTOMETRIC.RGB
        assert page.software == "gspn2_diffusers"


@pytest.mark.parametrize("size", [(100, 64), (33, 130), (16, 17), (16, 16)], ids=str)
def test_a_pyramid_halves_the_picture_until_it_is_small(tmp_path, small_pyramids, size):
    pixels = picture(*size)
    write(tmp_path / "a.tif", pixels, (30,))
    exact, levels = pixels.astype(float), [pixels]
    while max(exact.shape) > 16:
        exact = halved(exact)
        levels.append(np.rint(exact).astype(np.uint8))
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        written = file.series[0].levels
        assert [level.shape for level in written] == [level.shape for level in levels]
        for got, expected in zip(written, levels, strict=True):
            assert np.array_equal(got.asarray(), expected)
        reduced = list(file.pages[0].pages or [])
        assert [page.subfiletype for page in reduced] == [1] * (len(levels) - 1)


def test_a_pyramid_ends_at_1024_pixels_in_tiles_of_512(tmp_path):
    pixels = np.repeat(picture(3, 2050), 2, axis=0)
    write(tmp_path / "a.tif", pixels)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert [level.shape[:2] for level in file.series[0].levels] == [
            (6, 2050), (3, 1025), (2, 513),
        ]  # fmt: skip


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_the_preview_is_the_reduced_picture(tmp_path, suffix):
    pixels = picture(1500, 1100)
    preview = write(tmp_path / f"a{suffix}", pixels, (333,)).preview()
    assert preview.size == (550, 750)
    assert np.array_equal(np.asarray(preview), np.rint(halved(pixels)).astype(np.uint8))


def test_the_preview_shrinks_further_on_demand_and_never_grows(tmp_path):
    writer = write(tmp_path / "a.tif", picture(90, 60))
    assert np.array_equal(np.asarray(writer.preview()), picture(90, 60))
    assert writer.preview(30).size == (20, 30)
    with pytest.raises(ValueError, match="longest: expected 1 to 1024 pixels, got 2000"):
        writer.preview(2000)


def test_there_is_no_preview_of_half_a_picture(tmp_path):
    with open_image(tmp_path / "a.png", 4, 4) as writer:
        writer.write(picture(2, 4))
        with pytest.raises(ValueError, match="expected 4 rows, got 2"):
            writer.preview()
        writer.write(picture(2, 4))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".webp"])
@pytest.mark.parametrize("metadata", [METADATA, {}, None], ids=["some", "none", "None"])
def test_metadata_comes_back(tmp_path, suffix, metadata):
    write(tmp_path / f"a{suffix}", picture(20, 30), metadata=metadata)
    assert read_metadata(tmp_path / f"a{suffix}") == (metadata or {})


def test_metadata_is_where_other_programs_look_for_it(tmp_path):
    write(tmp_path / "a.png", picture(20, 30), metadata=METADATA)
    write(tmp_path / "a.tif", picture(20, 30), metadata=METADATA)
    with Image.open(tmp_path / "a.png") as image:
        assert image.text == METADATA
    with Image.open(tmp_path / "a.tif") as image:
        assert json.loads(image.tag_v2[270]) == METADATA


def test_metadata_of_a_huge_png_is_read_without_decoding_it(tmp_path, monkeypatch):
    write(tmp_path / "a.png", picture(40, 50), metadata=METADATA)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    monkeypatch.setattr(Image.Image, "load", None)
    assert read_metadata(tmp_path / "a.png") == METADATA


def test_a_tiff_by_other_programs_has_no_metadata(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", picture(20, 30), description="a lake", metadata=None)
    assert read_metadata(tmp_path / "a.tif") == {}


@pytest.fixture(params=[".png", ".tif"])
def old_file(request, tmp_path):
    """A file that is there before; afterwards it must be as it was, and alone."""
    path = tmp_path / f"a{request.param}"
    path.write_bytes(b"old")
    yield path
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == [path.name]
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


def test_an_error_of_the_caller_leaves_the_old_file(old_file):
    with pytest.raises(KeyError), open_image(old_file, 2000, 600) as writer:
        writer.write(picture(1500, 600))
        raise KeyError("elsewhere")


def test_a_missing_row_leaves_the_old_file(old_file):
    with pytest.raises(ValueError, match="expected 600 rows, got 599"):
        with open_image(old_file, 600, 40) as writer:
            writer.write(picture(599, 40))


def test_a_row_too_many_leaves_the_old_file(old_file):
    with pytest.raises(ValueError, match="expected at most 1 more rows of 600, got 2"):
        with open_image(old_file, 600, 40) as writer:
            writer.write(picture(599, 40))
            writer.write(picture(2, 40))


@pytest.mark.parametrize(
    "band",
    [np.zeros((2, 41, 3), np.uint8), np.zeros((2, 40), np.uint8), np.zeros((2, 40, 3), np.float32)],
    ids=["width", "grey", "float"],
)
def test_a_band_of_another_kind_leaves_the_old_file(old_file, band):
    with pytest.raises(ValueError, match=r"expected a band of uint8 \[rows, 40, 3\], got"):
        with open_image(old_file, 600, 40) as writer:
            writer.write(band)


def test_a_finished_picture_replaces_the_old_file(tmp_path):
    for suffix in (".png", ".tif"):
        (tmp_path / f"a{suffix}").write_bytes(b"old")
        write(tmp_path / f"a{suffix}", picture(30, 40))
        assert np.array_equal(read(tmp_path / f"a{suffix}"), picture(30, 40))
    assert sorted(os.listdir(tmp_path)) == ["a.png", "a.tif"]


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_others_may_read_the_file_if_the_user_wants_so(tmp_path):
    before = os.umask(0o022)
    try:
        for suffix in (".png", ".tif"):
            write(tmp_path / f"a{suffix}", picture(30, 40))
            assert (tmp_path / f"a{suffix}").stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


def test_an_error_of_the_threads_that_compress_surfaces(old_file, monkeypatch):
    def fail(pixels):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(writing, "_deflate", fail)
    monkeypatch.setattr(writing, "_deflate_rows", fail)
    with pytest.raises(OSError, match="broken"), open_image(old_file, 6000, 40) as writer:
        for _ in range(60):
            writer.write(picture(100, 40))


@pytest.mark.parametrize("old_file", [".tif"], indirect=True)
def test_an_error_of_the_thread_that_writes_stops_the_caller_within_the_queue(
    old_file, monkeypatch
):
    def fail(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(tifffile.TiffWriter, "write", fail)
    written = 0
    with pytest.raises(OSError, match="disk full"), open_image(old_file, 512 * 50, 40) as writer:
        for _ in range(50):
            writer.write(picture(512, 40))
            written += 1
    assert written <= 8


@pytest.mark.parametrize("old_file", [".png"], indirect=True)
@pytest.mark.parametrize("mode", ["wb", "ab"], ids=["header", "pixels"])
@pytest.mark.parametrize("size", [(4, 5), (1000, 600)], ids=["buffered", "unbuffered"])
def test_a_full_disk_leaves_the_old_file(old_file, monkeypatch, mode, size):
    class FullDisk(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "disk full")

    def open_file(path, mode_of_file="r", *args, **kwargs):
        if mode_of_file == mode:
            return io.BufferedWriter(FullDisk(path, mode))
        return really_open(path, mode_of_file, *args, **kwargs)

    really_open = Path.open
    monkeypatch.setattr(Path, "open", open_file)
    with pytest.raises(OSError, match="disk full"):
        write(old_file, picture(*size), metadata=METADATA)


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".tif", "_deflate"), (".png", "_deflate_rows")], ids=["tif", "png"]
)
def test_rows_wait_for_the_disk_instead_of_filling_memory(tmp_path, monkeypatch, suffix, compress):
    gate, deflate = threading.Event(), getattr(writing, compress)
    monkeypatch.setattr(writing, compress, lambda pixels: gate.wait(60) and deflate(pixels))
    monkeypatch.setattr(writing, "_PNG_BLOCK", 512 * 40 * 3)
    monkeypatch.setattr(writing, "_PNG_BLOCKS_AHEAD", 2)
    pixels, handed_over = picture(512 * 12, 40), []

    def feed(writer):
        for start in range(0, len(pixels), 512):
            writer.write(pixels[start : start + 512])
            handed_over.append(start)

    with open_image(tmp_path / f"a{suffix}", *pixels.shape[:2]) as writer:
        thread = threading.Thread(target=feed, args=(writer,))
        thread.start()
        thread.join(1)
        waiting = len(handed_over)
        gate.set()
        thread.join(60)
    assert 0 < waiting <= 4 and len(handed_over) == 12
    assert np.array_equal(read(tmp_path / f"a{suffix}"), pixels)


@pytest.mark.parametrize("make", [check_writable, lambda *args: open_image(*args).__enter__()])
@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("a.bmp", (4, 4), r"expected a picture's suffix \(.png, .* .tiff\), got '.bmp'"),
        ("a", (4, 4), "got 'none'"),
        ("a.png", (0, 4), "at least 1 x 1 pixels, got 0 x 4"),
        ("a.jpg", (2**14, 2**14 + 1), "expected at most 268435456 pixels .* write a .tif"),
        ("a.png", (4, 2**29 + 1), "no side over 536870912 for .png, got 4 x 536870913: write"),
        ("a.jpg", (4, 65501), "no side over 65500 for .jpg, got 4 x 65501: write a .tif"),
        ("a.webp", (16384, 4), "no side over 16383 for .webp"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(tmp_path, make, name, size, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / name, *size)
    assert not os.listdir(tmp_path)


def test_a_jpeg_of_16384_squared_and_larger_files_of_other_formats_are_accepted(
    tmp_path, monkeypatch
):
    room(monkeypatch, 10**13)
    check_writable(tmp_path / "a.jpg", 2**14, 2**14)
    check_writable(tmp_path / "a.png", 2**18, 2**17)
    check_writable(tmp_path / "a.tif", 2**18, 2**17)
    assert not os.listdir(tmp_path)


def room(monkeypatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")(10**15, 0, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)


def test_a_disk_without_room_is_refused_in_readable_numbers(tmp_path, monkeypatch):
    room(monkeypatch, 1_050_000_000)
    with pytest.raises(OSError, match=r"room for 1\.08 GB in .*, got 1\.05 GB") as caught:
        check_writable(tmp_path / "new" / "a.tif", 16384, 16384)
    assert caught.value.errno == errno.ENOSPC and not os.listdir(tmp_path)
    check_writable(tmp_path / "a.png", 16384, 16384)  # has no reduced sizes


def test_the_folder_is_made_and_nothing_left_in_it(tmp_path):
    check_writable(tmp_path / "one" / "two" / "a.png", 4, 4)
    assert os.listdir(tmp_path / "one") == ["two"] and not os.listdir(tmp_path / "one" / "two")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    for path in (tmp_path / "file" / "a.png", tmp_path / "file" / "below" / "a.png"):
        with pytest.raises(OSError, match="expected a folder for a.png that can be written to"):
            check_writable(path, 4, 4)
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "read-only")

    monkeypatch.setattr("pathlib.Path.touch", fail)
    with pytest.raises(PermissionError, match="expected a folder .* got .*read-only"):
        check_writable(tmp_path / "a.png", 4, 4)


def test_a_folder_in_the_way_is_refused(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(IsADirectoryError, match="expected a file or nothing at .* got a folder"):
        check_writable(tmp_path / "a.png", 4, 4)


def test_a_missing_tifffile_is_named_and_not_needed_for_png(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    for use in (
        lambda path: check_writable(path, 4, 4),
        lambda path: write(path, picture(4, 4)),
        read_metadata,
    ):
        with pytest.raises(ImportError, match="pip install tifffile"):
            use(tmp_path / "a.tif")
    assert not os.listdir(tmp_path)
    write(tmp_path / "a.png", picture(4, 4), metadata=METADATA)
    assert read_metadata(tmp_path / "a.png") == METADATA
