"""Hold a method, built in or a plugin, against the contract: ``python -m solo.certify METHOD``."""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from solo.bars import Bar
from solo.config import load, plain
from solo.console import quiet_libraries, table
from solo.errors import ConfigError, Parser, SoloError, reported
from solo.experiment import experiment
from solo.testing.case import SIZES, Case
from solo.testing.certificate import Row, certificate
from solo.testing.compare import Measured


def main(argv: Sequence[str] | None = None) -> int:
    """The command.

    Returns:
        0 where every check holds, else 1.

    Raises:
        ConfigError: no such method, one that cannot be built, a recipe of another one, fewer than 2 ranks.
    """
    parser = Parser(prog="python -m solo.certify", description=__doc__)
    parser.add_argument("method", metavar="METHOD", help="a name, or module:Class")
    parser.add_argument("--config", metavar="PATH", help="take method_kwargs and views of this recipe, made small")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4], metavar="N", help="numbers of processes (default: 2 4)")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args(argv)
    if min(options.ranks) < 2:
        raise ConfigError(f"--ranks must be at least 2 each, got {min(options.ranks)}")
    sys.path.insert(0, "")                      # a plugin beside us
    torch.set_num_threads(1)
    case = Case(options.method, **(_recipe(options.method, options.config) if options.config else {}))
    _build(case)
    logging.getLogger("solo").setLevel(logging.ERROR)       # what the small runs have to say
    rows = []
    form = "{n_fmt} checks, {elapsed}{postfix}"
    with Bar(bar_format=form, leave=False, file=sys.stderr) as bar, redirect_stdout(StringIO()):
        for row in certificate(case, options.ranks):
            rows.append(row)
            bar.set_postfix_str(f"{row.check}: {row.result}", refresh=False)
            bar.update()
    print_markdown(options.method, rows) if options.markdown else print_table(options.method, rows)
    return 1 if any(row.problem for row in rows) else 0


def _build(case: Case) -> None:
    """What is wrong with a name, a value or the method's own ``__init__`` is one line, before any check."""
    try:
        case.build()
    except SoloError:
        raise
    except Exception as error:                  # a plugin's, of any kind
        kind = case.method.rpartition(":")[2]
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"{case.method} cannot be built as {kind}(backbone, config): {problem} (--debug: where)") from error


def _recipe(method: str, path: str) -> dict[str, Any]:
    """What a recipe says of the method and its views, for images of 16 pixels."""
    values = load(Path(path), ["data.train_path=unused", "data.val_path=unused"])
    if values.get("method") != method:
        raise ConfigError(f"{path} is a recipe of method {values.get('method')!r}, not of {method!r}")
    config = experiment(values)
    kwargs = {field.name: getattr(config.method_kwargs, field.name) for field in dataclasses.fields(config.method_kwargs)}
    small = {key: min(value, SIZES[key]) if key in SIZES and value else value for key, value in plain(kwargs).items()}
    largest = max(view.crop_size for view in config.augmentations)
    views = [{**plain(view), "crop_size": 16 if view.crop_size == largest else 8} for view in config.augmentations]
    return {"method_kwargs": small, "augmentations": views}


def _numbers(row: Row) -> tuple[str, str]:
    if not isinstance(row.found, Measured):
        return "", ""
    return f"{row.found.largest:.1e}" if row.found.largest else "0", f"{row.found.bound:g}" or "0"


def _title(method: str, rows: Sequence[Row]) -> str:
    results = [row.result for row in rows]
    absent = results.count("absent")
    return f"{method}: {results.count('holds')} of {len(rows)} hold" + (f", {absent} absent" if absent else "")


def print_table(method: str, rows: Sequence[Row]) -> None:
    """A table for the terminal, and below it what fails and what else there is to say."""
    columns = ["check", "result", "largest difference", "bound"]
    print(table(_title(method, rows), columns, [[row.check, row.result, *_numbers(row)] for row in rows], left=(0, 1)))
    for row in rows:
        if row.remark:
            print(f"{row.check}: {row.remark}")


def print_markdown(method: str, rows: Sequence[Row]) -> None:
    """The same table in Markdown."""
    print(f"| `{method}` | result | largest difference | bound |\n|---|---|---|---|")
    for row in rows:
        said = f"{row.result}: {row.remark.replace('|', '/')}" if row.remark else row.result
        print(f"| {row.check} | {said} | {' | '.join(_numbers(row))} |")


if __name__ == "__main__":
    quiet_libraries()
    with reported():
        sys.exit(main())
