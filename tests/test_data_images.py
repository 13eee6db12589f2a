"""Pictures and masks as they are stored in the wild: rotations, modes, bit depths, damage."""

import contextlib
import io
import warnings

import numpy as np
import pytest
from PIL import Image

from fvg_adapter.data import UnreadableImageError
from fvg_adapter.data.errors import DataError
from fvg_adapter.data.images import read_mask, read_picture

WIDTH, HEIGHT = 24, 16
# stored = upright turned by this, so that the tag's reader turns it back
STORE = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def upright_pair(size=(WIDTH, HEIGHT)):
    """A picture that is bright exactly where its mask is, with no symmetry."""
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[1:6, 2:9] = 255
    mask[1:12, 2:4] = 255
    return Image.fromarray(mask).convert("RGB"), Image.fromarray(mask)


def stored(image, orientation, format="PNG", tag=True, **options):
    if STORE[orientation] is not None:
        image = image.transpose(STORE[orientation])
    exif = Image.Exif()
    if tag:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, format, exif=exif, **options)
    return buffer.getvalue()


def bright(image):
    return np.asarray(image.convert("L")) > 127


@pytest.mark.parametrize("size", [(24, 16), (16, 16)])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "LZW"])
@pytest.mark.parametrize("orientation", STORE)
def test_exif_turns_picture_and_mask_alike(orientation, format, size):
    image, mask = upright_pair(size)
    exact = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}, "LZW": {"compression": "tiff_lzw"}}
    name = "TIFF" if format == "LZW" else format
    picture = read_picture(stored(image, orientation, name, **exact.get(format, {})), "a")
    assert picture.image.size == size
    assert (bright(picture.image) == bright(mask)).all()
    for tag in (True, False):  # a mask that kept the tag, and one made from the stored pixels without it
        decoded = read_mask(stored(mask, orientation, tag=tag), "m", picture)
        assert (np.asarray(decoded) == np.asarray(mask)).all(), tag


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("shrink", [1, 2])
def test_mask_made_for_the_upright_picture_stays(orientation, shrink):
    image, mask = upright_pair()
    picture = read_picture(stored(image, orientation), "a")
    small = mask.resize((WIDTH // shrink, HEIGHT // shrink), Image.Resampling.NEAREST)
    decoded = read_mask(stored(small, 1), "m", picture)
    assert decoded.size == picture.image.size
    if shrink == 1:
        assert (np.asarray(decoded) == np.asarray(mask)).all()


def test_mask_of_another_resolution_is_resized_with_nearest():
    image, mask = upright_pair()
    double = mask.resize((2 * WIDTH, 2 * HEIGHT), Image.Resampling.NEAREST)
    assert np.array_equal(read_mask(double, "m", read_picture(image, "a")), mask)


def grey_ramp(dtype, top):
    return np.linspace(0, top, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH).astype(dtype)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(grey_ramp(np.uint8, 255)),
        Image.fromarray(grey_ramp(np.uint16, 65535)),
        Image.fromarray(grey_ramp(np.int32, 65535)),
        Image.fromarray(grey_ramp(np.int32, 255)),
        Image.fromarray(grey_ramp(np.float32, 1)),
        Image.fromarray(grey_ramp(np.uint8, 255)).convert("CMYK"),
        Image.fromarray(grey_ramp(np.uint8, 255)).convert("LA"),
        Image.fromarray(grey_ramp(np.uint8, 255)).convert("RGBA"),
        Image.fromarray(grey_ramp(np.uint8, 255)).convert("YCbCr"),
        Image.fromarray(grey_ramp(np.uint8, 255)).convert("P"),
    ],
    ids=lambda image: image.mode,
)
def test_every_mode_becomes_rgb(image):
    rgb = read_picture(image, "a").image
    assert rgb.mode == "RGB"
    got, expected = np.asarray(rgb).astype(int), grey_ramp(np.uint8, 255).astype(int)[..., None]
    assert np.abs(got - expected).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_files_are_scaled_not_clipped(format):
    buffer = io.BytesIO()
    Image.fromarray(grey_ramp(np.uint16, 65535)).save(buffer, format)
    values = np.asarray(read_picture(buffer.getvalue(), "a").image)
    assert values.mean() == pytest.approx(127.5, abs=1)


def test_palette_with_transparency_and_cmyk_file():
    palette = Image.new("RGB", (4, 4), (200, 10, 30)).quantize(4)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=b"\x80\x00")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_picture(buffer.getvalue(), "a").image.getpixel((0, 0)) == (200, 10, 30)
    buffer = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(buffer, "JPEG")
    red, green, blue = read_picture(buffer.getvalue(), "a").image.getpixel((4, 4))
    assert red > 200 and green < 60 and blue < 60


def test_alpha_is_dropped_as_clip_does():
    assert read_picture(Image.new("RGBA", (2, 2), (9, 8, 7, 0)), "a").image.getpixel((0, 0)) == (9, 8, 7)


def test_one_pixel():
    picture = read_picture(Image.new("L", (1, 1), 255), "a")
    assert picture.image.size == (1, 1)
    assert read_mask(Image.new("1", (1, 1), 1), "m", picture).getpixel((0, 0)) == 255


def mask_of(image):
    return np.asarray(read_mask(image, "m", read_picture(Image.new("RGB", image.size), "a")))


def test_mask_is_the_mean_of_the_channels_above_one_half():
    values = np.array([[[255, 255, 0], [255, 0, 0], [127, 128, 127], [128, 128, 127], [127, 127, 127]]], np.uint8)
    assert mask_of(Image.fromarray(values)).tolist() == [[255, 0, 0, 255, 0]]  # means 170, 85, 127.3, 127.7, 127


def test_mask_with_jpeg_noise():
    _, mask = upright_pair((48, 48))
    buffer = io.BytesIO()
    mask.convert("RGB").save(buffer, "JPEG", quality=60)
    noisy = read_mask(buffer.getvalue(), "m", read_picture(Image.new("RGB", (48, 48)), "a"))
    assert set(np.unique(noisy)) == {0, 255}
    assert (np.asarray(noisy) == np.asarray(mask)).mean() > 0.98


@pytest.mark.parametrize("top", [1, 255, 65535])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_masks_of_other_ranges(top, dtype):
    if dtype == np.uint8 and top > 255:
        return
    binary = np.asarray(upright_pair()[1]) > 0
    assert np.array_equal(mask_of(Image.fromarray((binary * top).astype(dtype))) > 0, binary)


def test_bilevel_palette_and_empty_masks():
    _, mask = upright_pair()
    assert np.array_equal(mask_of(mask.convert("1")), mask)
    assert np.array_equal(mask_of(mask.convert("P")), mask)
    assert mask_of(Image.new("L", (4, 4), 0)).max() == 0


def noise_file(format):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize("data", [b"", b"not a picture", noise_file("JPEG")[:-600], noise_file("PNG")[:900]])
def test_damage_names_the_file_and_the_way_out(data):
    with pytest.raises(UnreadableImageError, match=r"'cat\.jpg'.*drop_unreadable"):
        read_picture(data, "cat.jpg")
    with pytest.raises(UnreadableImageError, match=r"'cat\.jpg'"):
        read_mask(data, "cat.jpg", read_picture(Image.new("RGB", (2, 2)), "a"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_no_damage_escapes_as_another_error(format):
    data, rng = noise_file(format), np.random.default_rng(1)
    for trial in range(60):
        broken = bytearray(data[: rng.integers(1, len(data))] if trial % 2 else data)
        for place in rng.integers(0, min(len(broken), 400), 5):
            broken[place] = rng.integers(0, 256)
        with contextlib.suppress(UnreadableImageError):
            assert read_picture(bytes(broken), "a").image.mode == "RGB"


def test_what_is_no_picture_at_all():
    with pytest.raises(DataError, match="int"):
        read_picture(3, "a")
    with pytest.raises(DataError, match="NoneType"):
        read_picture({"bytes": None, "path": None}, "a")


# -- masks that are more than black and white --------------------------------------------------------------------------


def test_palettes_of_labels_mark_everything_but_the_first_index():
    labels = np.zeros((6, 6), np.uint8)
    labels[1:3], labels[3:5] = 1, 15
    voc = Image.fromarray(labels).convert("P")
    voc.putdata(labels.ravel().tolist())
    palette = [0] * 768
    palette[3:6], palette[45:48] = (128, 0, 0), (192, 128, 128)  # dark and light: their means lie around one half
    voc.putpalette(palette)
    buffer = io.BytesIO()
    voc.save(buffer, "PNG")
    picture = read_picture(Image.new("RGB", (6, 6)), "a")
    assert np.array_equal(np.asarray(read_mask(buffer.getvalue(), "m", picture)) > 0, labels > 0)
    grey = Image.fromarray(labels).convert("P")
    grey.putdata(labels.ravel().tolist())
    grey.putpalette([value for i in range(256) for value in ((255 if i == 1 else 0),) * 3])
    assert np.array_equal(np.asarray(read_mask(grey, "m", picture)) > 0, labels == 1)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PNG palette"])
def test_a_cut_out_is_a_mask_by_its_alpha(mode):
    _, mask = upright_pair()
    dark = Image.new("RGB", mask.size, (20, 30, 40))
    if mode == "PNG palette":
        cut = Image.new("P", mask.size, 0)
        cut.putpalette([10, 10, 10, 20, 20, 20])
        cut.putdata((np.asarray(mask) > 0).astype(int).ravel().tolist())
        buffer = io.BytesIO()
        cut.save(buffer, "PNG", transparency=b"\x00\xff")
        source = buffer.getvalue()
    else:
        source = dark.convert("RGBA")
        source.putalpha(mask)
        source = source.convert(mode)
    picture = read_picture(Image.new("RGB", mask.size), "a")
    assert np.array_equal(read_mask(source, "m", picture), mask)
    opaque = mask.convert("RGBA")  # alpha says nothing: the colours do
    assert np.array_equal(read_mask(opaque, "m", picture), mask)


@pytest.mark.parametrize("orientation", STORE)
def test_as_stored_undoes_what_exif_does(orientation):
    from fvg_adapter.data.images import as_stored

    image, mask = upright_pair()
    turned = as_stored(mask, orientation)
    picture = read_picture(stored(image, orientation), "a")
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=exif)
    assert np.array_equal(read_mask(buffer.getvalue(), "m", picture), mask)
    assert turned.size == Image.open(io.BytesIO(stored(image, orientation))).size


# -- extreme sizes -----------------------------------------------------------------------------------------------------


def huge_png(width, height):
    """A valid PNG of zeros, made without its pixels in memory."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, rows = zlib.compressobj(1), []
    for _ in range(height):
        rows.append(packer.compress(bytes(width // 8 + 1)))
    data = b"".join(rows) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_twenty_thousand_pixels_a_side_are_refused_before_they_are_decoded(tmp_path):
    import resource

    path = tmp_path / "huge.png"
    path.write_bytes(huge_png(20_000, 20_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnreadableImageError, match=r"huge.*400000000 pixels.*178956970.*MAX_IMAGE_PIXELS = "):
        read_picture(path, str(path))
    with pytest.raises(UnreadableImageError, match="MAX_IMAGE_PIXELS"):
        read_mask(path, str(path), read_picture(Image.new("RGB", (4, 4)), "a"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes; decoded it has 400 MB


def test_the_limit_is_lifted_where_the_message_says(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    path.write_bytes(huge_png(400, 300))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    with pytest.raises(UnreadableImageError, match="120000 pixels"):
        read_picture(path, "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000_000)
    assert read_picture(path, "large.png").image.size == (400, 300)


def test_a_file_without_a_byte_says_so(tmp_path):
    path = tmp_path / "empty.jpg"
    path.touch()
    for source in (path, b"", {"bytes": b"", "path": None}):
        with pytest.raises(UnreadableImageError, match="the file is empty"):
            read_picture(source, "empty.jpg")
