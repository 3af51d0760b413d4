"""``python -m solo.bench gpu`` (``make bench-gpu``): all that is measured on one GPU, in about ``--minutes``.

Ceilings, correctness of the kernels, K1-K5; with ``--data FILE.npz`` (CIFAR-10 as encoded images) E1 and E2; E3 on synthetic
images, and with ``--tar FILE.tar`` from JPEGs; and in the time that is left a CIFAR-10 training whose schedule is as long as
fits. Rows are written as they come; what the results file has for this revision, this hardware and this torch is not measured
again, and a training that was cut off goes on. A stage that fails ends no other one: the exit status tells of it. Where one has
left the GPU unusable to those behind it, the call once more with ``--skip`` measures them.
"""

import argparse
import csv
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from solo.bench import beside, kernel
from solo.bench.device import clocks
from solo.bench.epochs import board, speed
from solo.bench.measure import Row, provenance, table, told, write
from solo.errors import ConfigError, EnvironmentFault, Interrupted, Parser

METHODS = ("nnclr", "all4one", "sce")
_KERNELS = ("K1", "K2", "K3", "K4")     # not written where KC or KT found wrong numbers
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
    known = [*(id for id, _ in stages), "EB"]
    if unknown := set(arguments.skip).difference(known):
        raise ConfigError(f"--skip {' '.join(sorted(unknown))}: no such stage; they are {', '.join(known)}")
    rows: list[Row] = []
    failed: list[str] = []
    for id, stage in stages:
        if id in arguments.skip:
            print(f"{id}: left out", flush=True)
            continue
        setting = _setting(arguments.overrides) if id in ("E1", "E2", "E3") else ""
        trusted = not (id in _KERNELS and {"KC", "KT"} & {*failed, *arguments.skip})
        rows += _guarded(id, partial(_once, id, stage, path, setting, trusted), failed)
    if arguments.tar is None:
        print("no --tar: E3 from JPEGs is left out")
    if arguments.data is None:
        print("no --data: E1, E2 and the training are left out")
    elif "EB" not in arguments.skip:
        def training() -> list[Row]:
            left = arguments.minutes * 60 - (time.monotonic() - began)
            return _board(arguments.method, left, rows, overrides, path, arguments.epochs)

        rows += _guarded("EB", training, failed)
    print(clocks() if device == "cuda" else "", flush=True)
    print(table(rows))
    if failed:
        raise EnvironmentFault(f"failed, see above: {', '.join(failed)}; all else is in {path}")


def _guarded(id: str, stage: Callable[[], list[Row]], failed: list[str]) -> list[Row]:
    """The stage's rows, or none and its name among those that failed."""
    try:
        return stage()
    except Interrupted:
        raise
    except Exception as fault:
        traceback.print_exc()
        print(f"{id}: failed, {type(fault).__name__}: {fault}", flush=True)
        failed.append(id)
        return []


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python -m solo.bench gpu", description=__doc__)
    kernel.add_arguments(parser)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as one .npz of encoded images (data.dataset=npz)")
    parser.add_argument("--tar", type=Path, help="JPEGs of 224 px and more as one .tar; a few are repeated (data.dataset=tar)")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all stages; the training takes what is left")
    parser.add_argument("--epochs", type=int, help="of the training, e.g. 200 for E4; by default as many as fit")
    parser.add_argument("--method", choices=METHODS, default="nnclr", help="of the training")
    parser.add_argument("--skip", action="append", default=[], metavar="ID", help="a stage to leave out; may be given again")
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


def _once(id: str, stage: Callable[[], list[Row]], path: Path, setting: str, trusted: bool = True) -> list[Row]:
    """The stage's rows: those the file has for these circumstances, else measured and, if trusted, written."""
    found = list(_kept(path, id, setting))
    if found:
        print(f"{id}: in {path} already", flush=True)
        return found
    found = stage()
    if trusted:
        write(found, path, setting)
    else:
        print(f"{id}: not written, for the kernels' numbers are wrong or unknown")
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


def _board(
    method: str, left: float, rows: list[Row], overrides: list[str], path: Path, wanted: int | None = None
) -> list[Row]:
    """A training of ``wanted`` epochs, or as long as fits into ``left`` seconds; one that was begun goes on as planned."""
    plan = f"{method}: epochs of the training"
    setting = _setting(overrides)
    kept = list(_kept(path, "EB", setting))
    begun = [entry for entry in kept if entry.what == plan and wanted in (None, entry.value)]
    epochs = wanted or int(begun[0].value if begun else left / (_epoch(method, rows, overrides, path) * _VALIDATION))
    if wanted is None and epochs < _TOO_SHORT:
        print(f"{left:.0f} s are left, enough for {max(0, epochs)} epochs: too few, no training (--minutes gives more)")
        return []
    done = [entry for entry in kept if entry.what.startswith(f"{method},")]
    if any(entry.what.endswith(f"after epoch {epochs}") for entry in done):
        print(f"EB: {method} in {path} already", flush=True)
        return done
    if not begun:
        write([Row("EB", plan, epochs, "epochs")], path, setting)
    print(f"{method} for {epochs} epochs, {left:.0f} s are left", flush=True)
    found = board(method, epochs, every=max(1, epochs // 10), overrides=overrides)
    write(found, path, setting)
    return found


def _epoch(method: str, rows: list[Row], overrides: list[str], path: Path) -> float:
    """Seconds of one of the method's own epochs: as E1 or E2 has found, else measured."""
    known = [entry for entry in rows if entry.unit == "s/epoch" and entry.what.startswith(f"{method},")]
    known = known or _once("ET", partial(speed, "ET", method, overrides), path, ", ".join([method, *told(overrides)]))
    return next(entry.value for entry in known if entry.unit == "s/epoch")
