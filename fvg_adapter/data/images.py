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
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Picture:
    """An upright RGB picture, and the EXIF orientation (1 to 8) in which it was stored."""

    image: PILImage
    orientation: int = 1


def is_image_name(name: str) -> bool:
    """Whether a file name looks like a picture: a known extension, and not a hidden file."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def read_picture(source: Any, name: str) -> Picture:
    """Decode a picture: EXIF rotation applied, palettes, greyscale, CMYK and 16 bits made 8-bit RGB, alpha dropped.

    Args:
        source: a path, encoded bytes, a `{"bytes", "path"}` dict of the datasets library, or a PIL image.
        name: what messages call it.

    Raises:
        UnreadableImageError: missing, empty, truncated or not a picture.
    """
    stored, orientation = _decode(source, name)
    return Picture(to_rgb(stored), orientation)


def read_mask(source: Any, name: str, picture: Picture) -> PILImage:
    """Decode the mask of a picture: the mean of its channels, brought to the picture's geometry, above one half or not.

    A mask without an orientation of its own that was made for the picture as it is stored (same size, or the nearer
    aspect ratio; where both fit, as with square pictures, the stored one) is turned upright with it. Another
    resolution is resized with nearest. A greyscale mask of zeros and ones counts ones as foreground.

    Returns:
        "L" image of the picture's size, values 0 and 255.

    Raises:
        UnreadableImageError: missing, empty, truncated or not a picture.
    """
    stored, own_orientation = _decode(source, name)
    mask = binary_mask(stored)
    if own_orientation == 1 and _made_for_stored(mask.size, picture):
        mask = mask.transpose(_UPRIGHT[picture.orientation])
    return mask if mask.size == picture.image.size else mask.resize(picture.image.size, Resampling.NEAREST)


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
    """ "L" image with 255 where the mean of a mask's channels is above one half of its range, 0 elsewhere."""
    if mask.mode == "L" or _is_wide(mask.mode):
        values = np.asarray(mask)
        ones = values.size > 0 and values.max() == 1
        grey = values.astype(np.float64) * 255 if ones else _eight_bits(values)
    else:
        grey = np.asarray(to_rgb(mask)).mean(axis=-1)  # (H, W, 3) -> (H, W)
    return Image.fromarray(np.where(grey > 127.5, 255, 0).astype(np.uint8))


def _decode(source: Any, name: str) -> tuple[PILImage, int]:
    """The upright picture in its stored mode, and the orientation in which it was stored."""
    try:
        if isinstance(source, PILImage):
            return _upright(source)
        with Image.open(_readable(source, name)) as stored:
            return _upright(stored)
    except _DAMAGED as error:
        if isinstance(error, DataError):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise UnreadableImageError(
            f"Could not read the picture {name!r} ({reason}). Replace or remove the file; "
            "dataset.check() lists every such file and dataset.drop_unreadable() leaves them out."
        ) from error


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
