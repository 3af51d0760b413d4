"""Numbers with what is needed to make them again: tables on the screen, ``results.json`` on disk."""

import json
from pathlib import Path
from typing import Any

from solo.console import table
from solo.errors import EnvironmentFault
from solo.files import write_file
from solo.reading import read_json
from solo.redaction import redacted


def run_directory(checkpoint: Path) -> Path:
    """The run a checkpoint belongs to: the folder above its ``checkpoints/``, or its own."""
    parent = checkpoint.resolve().parent
    return parent.parent if parent.name == "checkpoints" else parent


def writable(output: str | None) -> Path | None:
    """The folder ``output`` names, made before any work is done for it.

    Raises:
        EnvironmentFault: it cannot be made.
    """
    if output is None:
        return None
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(f"output={output} cannot be made: {error.strerror}") from error
    return Path(output)


def record(directory: Path, section: str, content: Any) -> Path:
    """Put one section into ``directory/results.json``, atomically, and keep the others.

    Args:
        directory: created if needed.
        section: e.g. ``knn``; replaced if it is there.
        content: JSON-able: metric, protocol, checkpoint hash, config.

    Returns:
        The file.

    Raises:
        EnvironmentFault: it cannot be written.
    """
    path = directory / "results.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            results = read_json(path)
        except (FileNotFoundError, ValueError):
            results = {}
        results = results if isinstance(results, dict) else {}
        write_file(path, json.dumps({**results, section: redacted(content)}, indent=2).encode())
    except OSError as error:
        raise unwritable(path, error) from error
    return path


def unwritable(path: Path, error: OSError) -> EnvironmentFault:
    """What ends a command whose results find no place."""
    return EnvironmentFault(f"{path} cannot be written: {error.strerror}; output=FOLDER writes elsewhere")


def show(title: str, columns: list[str], rows: list[list[Any]], caption: str = "") -> None:
    """Print a table and a line below it; floats get two digits."""
    cells = [[f"{value:.2f}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    print(table(title, columns, cells))
    if caption:
        print(caption)
