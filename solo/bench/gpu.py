"""``python -m solo.bench gpu`` (``make bench-gpu``): all that is measured on one GPU, in about ``--minutes``.

Ceilings, correctness of the kernels, K1-K5; with ``--data FILE.npz`` (CIFAR-10 as encoded images) E1 and E2; E3 on synthetic
images, and with ``--tar FILE.tar`` from JPEGs; and in the time that is left a CIFAR-10 training whose schedule is as long as
fits. Rows are written as they come; what the results file has for this revision, this hardware and this torch is not measured
again, and a training that was cut off goes on.
"""

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from solo.bench import beside, kernel
from solo.bench.device import clocks
from solo.bench.epochs import board
from solo.bench.measure import Row, provenance, table, told, write
from solo.errors import ConfigError, Parser

METHODS = ("nnclr", "all4one", "sce")
_TOO_SHORT = 20             # epochs of a schedule that is not worth its row
_SAME = ("revision", "hardware", "versions", "setting")     # of a row that is not measured again
_VALIDATION = 1.25          # an epoch with its validation beside one without


def main(argv: list[str]) -> None:
    arguments = _arguments(argv)
    device, scale, path = kernel.settled(arguments)
    began = time.monotonic()
    place = [] if device == "cuda" else ["accelerator=cpu"]
    overrides = [*_cifar(arguments.data), *place, *arguments.overrides]
    stages = list(kernel.stages(device, scale))
    if arguments.data is not None:
        for id, method in (("E1", "nnclr"), ("E2", "all4one")):
            stages.append((id, partial(beside.small, id, method, overrides, device, scale.pairs)))
    stages.append(("ES", partial(beside.synthetic, device, scale.pairs)))
    if arguments.tar is not None:
        where = [*place, *arguments.overrides]
        stages.append(("E3", partial(beside.large, _file("--tar", arguments.tar), where, device, scale.pairs)))
    print(clocks() if device == "cuda" else "tiny sizes on a CPU: this shows that it runs, and nothing else", flush=True)
    rows: list[Row] = []
    for id, stage in stages:
        rows += _once(id, stage, path, _setting(arguments.overrides) if id in ("E1", "E2", "E3") else "")
    if arguments.tar is None:
        print("no --tar: E3 from JPEGs is left out")
    if arguments.data is None:
        print("no --data: E1, E2 and the training are left out")
    else:
        left = arguments.minutes * 60 - (time.monotonic() - began)
        rows += _board(arguments.method, left, rows, overrides, path)
    print(clocks() if device == "cuda" else "", flush=True)
    print(table(rows))


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python -m solo.bench gpu", description=__doc__)
    kernel.add_arguments(parser)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as one .npz of encoded images (data.dataset=npz)")
    parser.add_argument("--tar", type=Path, help="JPEGs of 224 px and more as one .tar, 5,120 or more (data.dataset=tar)")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all stages; the training takes what is left")
    parser.add_argument("--method", choices=METHODS, default="nnclr", help="of the training")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipes, e.g. checkpoint.dir=...")
    return parser.parse_intermixed_args(argv)


def _cifar(data: Path | None) -> list[str]:
    return [] if data is None else ["data.dataset=npz", f"data.train_path={_file('--data', data)}"]


def _file(option: str, path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(f"{option} {path} is not a file")
    return path


def _setting(overrides: list[str]) -> str:
    return ", ".join(told(overrides))


def _once(id: str, stage: Callable[[], list[Row]], path: Path, setting: str) -> list[Row]:
    """The stage's rows: those the file has for these circumstances, else measured and written."""
    found = list(_kept(path, id, setting))
    if found:
        print(f"{id}: in {path} already", flush=True)
        return found
    found = stage()
    write(found, path, setting)
    print(table(found), flush=True)
    return found


def _kept(path: Path, id: str, setting: str = "") -> Iterator[Row]:
    if not path.exists():
        return
    here = provenance() | {"setting": setting}
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line["id"] == id and all((line.get(key) or "") == here[key] for key in _SAME):
                numbers = {key: float(line[key]) for key in ("peer_value", "ratio", "ratio_min", "ratio_max") if line[key]}
                pairs = int(line["pairs"]) if line["pairs"] else None
                ratios = tuple(map(float, (line.get("ratios") or "").split()))
                value = float(line["value"])
                yield Row(id, line["what"], value, line["unit"], line["peer"], pairs=pairs, ratios=ratios, **numbers)


def _board(method: str, left: float, rows: list[Row], overrides: list[str], path: Path) -> list[Row]:
    """A training as long as fits into ``left`` seconds at the speed of E1 or E2; one that was begun goes on as planned."""
    plan = f"{method}: epochs of the training"
    setting = _setting(overrides)
    begun = [entry for entry in _kept(path, "EB", setting) if entry.what == plan]
    slowest = max(entry.value for entry in rows if entry.id in ("E1", "E2") and entry.unit == "s/epoch")
    epochs = int(begun[0].value if begun else left / (slowest * _VALIDATION))
    if epochs < _TOO_SHORT:
        print(f"{left:.0f} s are left, enough for {max(0, epochs)} epochs: too few, no training (--minutes gives more)")
        return []
    done = [entry for entry in _kept(path, "EB", setting) if entry.what.startswith(f"{method},")]
    if done:
        print(f"EB: {method} in {path} already", flush=True)
        return done
    if not begun:
        write([Row("EB", plan, epochs, "epochs")], path, setting)
    print(f"{method} for {epochs} epochs, {left:.0f} s are left", flush=True)
    found = board(method, epochs, every=max(1, epochs // 10), overrides=overrides)
    write(found, path, setting)
    return found
