"""Files that several data tests read."""

from pathlib import Path

import pytest
from PIL import Image

from solo.data import pack
from tests.data.common import broken, make_folder, picture


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of PNG and JPEG files of one size, and one that is broken."""
    root = tmp_path_factory.mktemp("images")
    make_folder(root, {"b": 7, "a": 5, "é": 4})
    for i in range(7):
        Image.fromarray(picture(50 + i, 20, 24)).save(root / "a" / f"{i}.jpg")
    (root / "b" / "0003.png").write_bytes(broken("truncated"))
    return root


@pytest.fixture(scope="session")
def packed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "images.h5"
    pack.main([str(images), str(path)])
    return path
