"""Decode pictures and masks to one known form, whatever was stored, and keep the two in the same geometry.

A picture becomes upright 8-bit RGB, a mask becomes "L" of the picture's size with 0 for background and 255 for
foreground (METHOD.md section 10). Imports numpy and PIL only.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from PIL.Image import Image as PILImage
from PIL.Image import Resampling, Transpose

from fvg_adapter.data.errors import DataError, UnreadableImageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {  # what turns a picture stored with this orientation upright (EXIF 2.3, table 4)
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
# What PIL's decoders raise on damaged input; anything else is a mistake of ours and stays visible.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
)
LABEL_NOISE = 16
"""A grey mask whose largest value is below one half of its range but above this may hold label numbers."""


@dataclass(frozen=True)
class Picture:
    """An upright RGB picture, and the EXIF orientation (1 to 8) in which it was stored."""

    image: PILImage
    orientation: int = 1


@dataclass(frozen=True)
class DecodedMask:
    """A mask in the geometry of its picture, and what was odd about it as it was stored.

    Attributes:
        image: "L", the picture's size, 0 and 255.
        stretched: its proportions are not the picture's (by more than the rounding of a pixel).
        dark: it is empty, yet not black: label numbers, perhaps.
    """

    image: PILImage
    stretched: bool = False
    dark: bool = False


def is_image_name(name: str) -> bool:
    """Whether a file name looks like a picture: a known extension, and not a hidden file."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def read_picture(source: Any, name: str) -> Picture:
    """Decode a picture: EXIF rotation applied, palettes, greyscale, CMYK and 16 bits made 8-bit RGB, alpha dropped.

    Args:
        source: a path, encoded bytes, a `{"bytes", "path"}` dict of the datasets library, or a PIL image.
        name: what messages call it.

    Raises:
        UnreadableImageError: missing, empty, truncated, not a picture, or of more pixels than PIL admits (twice
            `PIL.Image.MAX_IMAGE_PIXELS`, 179 million); nothing of such a file is decoded.
    """
    stored, orientation = _decode(source, name)
    return Picture(to_rgb(stored), orientation)


def read_mask(source: Any, name: str, picture: Picture) -> PILImage:
    """Decode the mask of a picture: the mean of its channels, brought to the picture's geometry, above one half or not.

    A mask without an orientation of its own that was made for the picture as it is stored (same size, or the nearer
    aspect ratio; where both fit, as with square pictures, the stored one) is turned upright with it. Another
    resolution is resized with nearest. See `binary_mask` for what counts as foreground.

    Returns:
        "L" image of the picture's size, values 0 and 255.

    Raises:
        UnreadableImageError: as for `read_picture`.
    """
    return decode_mask(source, name, picture).image


def decode_mask(source: Any, name: str, picture: Picture) -> DecodedMask:
    """`read_mask`, with what was odd about the mask."""
    stored, own_orientation = _decode(source, name)
    mask = binary_mask(stored)
    dark = stored.mode == "L" and LABEL_NOISE < int(np.asarray(stored).max(initial=0)) < 128
    if own_orientation == 1 and _made_for_stored(mask.size, picture):
        mask = mask.transpose(_UPRIGHT[picture.orientation])
    size = picture.image.size
    if mask.size == size:
        return DecodedMask(mask, dark=dark)
    return DecodedMask(mask.resize(size, Resampling.NEAREST), not _same_proportions(mask.size, size), dark)


def as_stored(mask: PILImage, orientation: int) -> PILImage:
    """An upright mask in the geometry in which a picture of this EXIF orientation is stored."""
    turn = _UPRIGHT.get(orientation)
    if turn is None:
        return mask
    back = {Transpose.ROTATE_270: Transpose.ROTATE_90, Transpose.ROTATE_90: Transpose.ROTATE_270}
    return mask.transpose(back.get(turn, turn))


def to_rgb(image: PILImage) -> PILImage:
    """8-bit RGB of a picture in any mode; alpha is dropped, as CLIP's own preprocessing does.

    Values of 16 and 32 bits are scaled by their range (255, 65535, or 1.0 for floats), where PIL would clip them.
    """
    if image.mode == "RGB":
        return image
    if _is_wide(image.mode):
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    elif image.mode in ("P", "PA", "RGBa", "La"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    return image.convert("RGB")


def binary_mask(mask: PILImage) -> PILImage:
    """ "L" image with 255 where a mask is foreground, 0 elsewhere.

    Foreground is where the mean of the channels is above one half of their range; ones in a greyscale mask of zeros and
    ones; where an alpha channel is not opaque everywhere (a cut-out), what is more opaque than not, of any colour; and
    every index but 0 of a palette that has colours (PASCAL VOC's, say), while a palette of greys is a grey picture.
    """
    alpha = _alpha(mask)
    if alpha is not None:
        grey: npt.NDArray[Any] = alpha
    elif mask.mode == "L" or _is_wide(mask.mode):
        values = np.asarray(mask)
        ones = values.size > 0 and values.max() == 1
        grey = (values != 0) * np.uint8(255) if ones else _eight_bits(values)
    elif mask.mode == "P" and _has_colours(mask):
        grey = (np.asarray(mask) != 0) * np.uint8(255)
    else:
        total = np.asarray(to_rgb(mask)).sum(axis=-1, dtype=np.uint16)  # (H, W, 3) -> (H, W)
        return Image.fromarray(np.where(total > 382, 255, 0).astype(np.uint8))  # a mean above 127.5
    return Image.fromarray(np.where(grey > 127, 255, 0).astype(np.uint8))


def _alpha(mask: PILImage) -> npt.NDArray[np.uint8] | None:
    """The alpha channel (H, W) of a mask, if it says anything."""
    if mask.mode in ("LA", "La", "RGBA", "RGBa", "PA"):
        alpha = np.asarray(mask.getchannel("A"))
    elif "transparency" in mask.info and mask.mode in ("P", "L", "RGB", "1"):
        alpha = np.asarray(mask.convert("RGBA").getchannel("A"))
    else:
        return None
    return alpha if alpha.size and alpha.min() < 255 else None


def _has_colours(mask: PILImage) -> bool:
    """Whether a palette picture uses an entry that is no grey."""
    palette = np.array(mask.getpalette("RGB") or [], dtype=np.int16).reshape(-1, 3)
    used = np.unique(np.asarray(mask))
    used = used[used < len(palette)]
    return bool(np.ptp(palette[used], axis=1).max(initial=0) > LABEL_NOISE)


def _decode(source: Any, name: str) -> tuple[PILImage, int]:
    """The upright picture in its stored mode, and the orientation in which it was stored."""
    try:
        if isinstance(source, PILImage):
            return _upright(source)
        with Image.open(_readable(source, name)) as stored:
            return _upright(stored)
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(
            f"The picture {name!r} is not decoded: {error} That is twice PIL.Image.MAX_IMAGE_PIXELS. Store it smaller "
            "(no model here sees more than a few hundred pixels a side), or raise the limit if you trust the file: "
            "PIL.Image.MAX_IMAGE_PIXELS = 1_000_000_000, at about 6 bytes of memory a pixel."
        ) from error
    except _DAMAGED as error:
        if isinstance(error, DataError):
            raise
        reason = "the file is empty" if _is_empty(source) else f"{type(error).__name__}: {error}"
        raise UnreadableImageError(
            f"Could not read the picture {name!r} ({reason}). Replace or remove the file; "
            "dataset.check() lists every such file and dataset.drop_unreadable() leaves them out."
        ) from error


def _is_empty(source: Any) -> bool:
    """Whether there is not a single byte."""
    if isinstance(source, dict):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if isinstance(source, (str, os.PathLike)):
        return Path(source).is_file() and Path(source).stat().st_size == 0
    return isinstance(source, bytes) and not source


def _readable(source: Any, name: str) -> Any:
    """What PIL can open: a path, or a buffer."""
    if isinstance(source, dict) and "bytes" in source:
        source = source["bytes"] if source["bytes"] is not None else source.get("path")
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, (str, os.PathLike)):
        return Path(source)
    raise DataError(f"{name!r} holds {type(source).__name__}, but a path, encoded bytes or a PIL image is expected.")


def _upright(stored: PILImage) -> tuple[PILImage, int]:
    # PIL turns TIFF files by itself while loading, after which the tag is gone (or, before Pillow 10.1, out of date).
    orientation = stored.getexif().get(_ORIENTATION, 1)
    stored.load()
    upright = stored.copy() if stored.format == "TIFF" else ImageOps.exif_transpose(stored)
    return upright, orientation if orientation in _UPRIGHT else 1


def _same_proportions(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether one (width, height) is the other resized, give or take the rounding of its sides."""
    (w, h), (ow, oh) = size, other
    return abs(w * oh - h * ow) <= max(oh, ow) + 0.01 * w * oh


def _made_for_stored(size: tuple[int, int], picture: Picture) -> bool:
    """Whether a mask of this (width, height) was made for the picture before it was turned upright."""
    if picture.orientation == 1:
        return False
    width, height = picture.image.size
    if picture.orientation < 5:  # mirrored or upside down: the size cannot tell
        return True
    return abs(size[0] * width - size[1] * height) <= abs(size[0] * height - size[1] * width)


def _is_wide(mode: str) -> bool:
    return mode in ("I", "F") or mode.startswith("I;16")


def _eight_bits(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Values of any range as uint8: floats up to 1, 8-bit and 16-bit values each by their own range."""
    if values.dtype == np.uint8:
        return values
    wide = np.nan_to_num(values.astype(np.float64))
    top = wide.max(initial=0.0)
    if values.dtype.kind == "f" and top <= 1:
        wide = wide * 255
    elif top > 255:
        wide = wide / 257
    return np.clip(np.rint(wide), 0, 255).astype(np.uint8)
