"""From a file's bytes to pixels, with every way they can be wrong ending as one `BadImage`."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision.io  # loads the operators
from PIL import Image, ImageOps, UnidentifiedImageError

from solo.data.reads import retried

MAX_PIXELS = 80_000_000
# Only these of Pillow's formats, whatever a file is called: its EPS, for one, starts Ghostscript.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
_ORIENTATION = 0x0112  # the EXIF tag

_RGB = 3


def _torchvision(content: bytes) -> np.ndarray:
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    # The operator itself: torchvision 0.29 warns at each call of the function around it, which is to go one day.
    return torch.ops.image.decode_jpeg(data, _RGB, False).permute(1, 2, 0).numpy()


def _fastest() -> Callable[[bytes], np.ndarray] | None:
    """What makes RGB [H, W, 3] of a JPEG's bytes: Pillow's pixels whoever does; ``None`` leaves it to Pillow."""
    slower = _torchvision if hasattr(torchvision.io, "decode_jpeg") and hasattr(torch.ops.image, "decode_jpeg") else None
    try:
        import simplejpeg
    except ImportError:
        return slower

    def quick(content: bytes) -> np.ndarray:
        try:
            return simplejpeg.decode_jpeg(content)
        except ValueError:
            if slower is None:
                raise
            return slower(content)  # is less strict, and alone judges what is bad

    return quick


_decode_jpeg = _fastest()


class BadImage(Exception):
    """An image that cannot be read; the message says why."""


def read_file(path: Path) -> bytes:
    """The file's bytes; tries and errors as of `patiently`."""
    return patiently(path.read_bytes, path)


def patiently(read: Callable[[], bytes], path: Path) -> bytes:
    """As `retried`, of an image.

    Raises:
        BadImage: it cannot be read.
        EnvironmentFault: this process may open no more files.
    """
    try:
        return retried(read, path)
    except OSError as error:
        raise BadImage(f"{type(error).__name__}: {error.strerror or error}") from error


def decode(content: bytes, in_chans: int) -> np.ndarray:
    """Any image Pillow reads, as [H, W, in_chans] uint8: RGB or grey, upright.

    JPEGs, whose header Pillow has checked, are decoded by simplejpeg or torchvision: the same pixels in less time.

    Raises:
        BadImage: the bytes are no complete image, or declare more than `MAX_PIXELS`.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"declares {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            upright = image.getexif().get(_ORIENTATION, 1) == 1
            if _decode_jpeg is not None and image.format == "JPEG" and image.mode == "RGB" and in_chans == 3 and upright:
                return _decode_jpeg(content)
            image.load()
            return _channels(image if upright else ImageOps.exif_transpose(image), in_chans)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"UnidentifiedImageError: none of the image formats ({len(content)} bytes)") from error
    except Exception as error:  # decoders raise whatever the broken bytes lead them to
        raise BadImage(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}") from error


def _channels(image: Image.Image, in_chans: int) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow would clip, not scale
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")
    mode = "RGB" if in_chans == 3 else "L"
    pixels = np.array(image if image.mode == mode else image.convert(mode))
    return pixels.reshape(*pixels.shape[:2], in_chans)


def convert_channels(pixels: np.ndarray, in_chans: int) -> np.ndarray:
    """[..., C] uint8 between grey and RGB, with Pillow's luma weights."""
    if pixels.shape[-1] == in_chans:
        return pixels
    if in_chans == 3:
        return np.repeat(pixels, 3, axis=-1)
    luma = pixels.astype(np.int64) @ np.array([19595, 38470, 7471]) + 0x8000
    return (luma >> 16).astype(np.uint8)[..., None]
