"""What a JPEG tells without being decoded."""

import io
import re

from PIL import Image
from PIL.ExifTags import Base

from solo.data.decoding import MAX_PIXELS

_SCAN, _END = 0xDA, 0xD9  # a JPEG's markers of a scan and of its end
_SEGMENTS = {0xC0, 0xC1, 0xC2, 0xC4, 0xDB, _SCAN, 0xDD, *range(0xE0, 0xF0), 0xFE}  # what a decoder of photographs knows
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")  # that ends a scan: neither a stuffed byte nor a restart


def jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Height and width of what is plainly a whole JPEG: RGB, upright, of known segments up to its end.

    ``None`` says nothing but that `solo.data.decoding.decode` has to tell.
    """
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            plain = image.mode == "RGB" and image.width * image.height <= MAX_PIXELS
            upright = plain and image.getexif().get(Base.Orientation, 1) == 1
            return (image.height, image.width) if upright and _whole(content) else None
    except Exception:  # whatever the broken bytes lead Pillow to
        return None


def _whole(content: bytes) -> bool:
    """Whether the segments of a JPEG, and the scans that follow some, lead to the marker of its end."""
    place = 2
    while content[place : place + 1] == b"\xff":
        marker = content[place + 1]
        if marker == _END:
            return True
        if marker not in _SEGMENTS:
            return False
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
        if marker == _SCAN:
            found = _MARKER.search(content, place)
            place = len(content) if found is None else found.start()
    return False
