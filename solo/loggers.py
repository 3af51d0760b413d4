"""Where a run's metrics go: Lightning's loggers by short names. None of them can end a run."""

import json
import logging
import math
import re
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from solo.errors import EnvironmentFault
from solo.experiment import Experiment
from solo.files import write_file
from solo.reading import read_json
from solo.spared import Spared

log = logging.getLogger(__name__)

# Asked over a network; the others write files here, which nobody waits for. Of each, what it calls the run to go on with, and
# for how many seconds its client may hold what it was given: Weights & Biases writes every 15 s.
SERVERS = {"wandb": ("id", 30.0), "mlflow": ("run_id", 0.0), "comet": ("experiment_key", 30.0)}
MORTAL = ("tensorboard",)                   # its writer's thread ends at the first failure

WANDB = {"disable_code": True, "disable_git": True, "x_disable_meta": True, "console": "off", "init_timeout": 30}


def loggers(config: Experiment, run_dir: Path) -> list[Logger]:
    """A run's loggers, writing below its directory where they can.

    Raises:
        EnvironmentFault: a package is missing.
    """
    names = [*config.loggers, *(["wandb"] if config.wandb.enabled else [])]
    makers = {name: _maker(name, config, run_dir) for name in names}
    return [Served(name, make, run_dir) if name in SERVERS else Spared(name, make, rests=False, mortal=name in MORTAL)
            for name, make in makers.items()]


def forget(run_dir: Path) -> None:
    """What begins in this directory is another run, on servers as well."""
    for file in [_kept(run_dir, name) for name in SERVERS]:
        if file.exists():       # each removal counts where `solo.bench.chaos` kills
            file.unlink()


class Served(Spared):
    """A logger on a server, where a run that goes on is the same run and has no metric of a step twice.

    A small file in the run's directory says which run it is there and up to which step the server has each metric. What an
    earlier start has sent is not sent again, though steps behind its last checkpoint are made again; what its client may
    still have held when it was killed is. A copy of a directory that is still there is another run.

    Args:
        title: its name in `SERVERS`.
        make: as of `Spared`; takes the keyword that goes on with a run.
        run_dir: the run's directory; read when the logger is made, so after `solo.start.begin` has decided.
    """

    def __init__(self, title: str, make: Callable[..., Logger], run_dir: Path) -> None:
        super().__init__(title, self._go_on, rests=True)
        self._begin, self._file = make, _kept(run_dir, title)
        self._keyword, self._held = SERVERS[title]
        self._before: dict[str, int] = {}       # metric -> last step that an earlier start has sent
        self._sent: dict[str, int] = {}         # metric -> last step of all
        self._there: dict[str, int] = {}        # the same, of what the client holds no more
        self._kept_at = -math.inf

    def _go_on(self) -> Logger:
        known, self._before = _read(self._file)
        self._sent, self._there = dict(self._before), dict(self._before)
        return self._begin(**({self._keyword: known} if known else {}))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._try("log_metrics", lambda made: self._send(made, metrics, step))

    @rank_zero_only
    def _send(self, made: Logger, metrics: dict[str, float], step: int | None) -> None:
        if step is None:
            return made.log_metrics(metrics)
        new = {name: value for name, value in metrics.items() if step > self._before.get(name, -1)}
        if new:
            made.log_metrics(new, step)
            self._sent |= dict.fromkeys(new, step)
            if made.version:                    # comet's is not known before its server answers
                with suppress(OSError):         # a full disk takes nothing from a server
                    self._keep(made.version)

    def _keep(self, known: int | str) -> None:
        now = time.monotonic()
        if now - self._kept_at >= self._held:
            there = self._there if self._held else self._sent
            kept = {"id": known, "folder": str(self._file.parent.resolve()), "steps": there}
            write_file(self._file, json.dumps(kept).encode())
            self._there, self._kept_at = dict(self._sent), now


def _kept(run_dir: Path, name: str) -> Path:
    return run_dir / f"{name}.json"


def _read(path: Path) -> tuple[str, dict[str, int]]:
    """Which run it is on the server, and the last step of each metric there; nothing where another is to begin."""
    try:
        kept = read_json(path)
        known, steps, other = kept["id"], kept["steps"], Path(kept["folder"]) / path.name
        if not re.fullmatch(r"[\w-]{1,128}", known) or not all(type(step) is int for step in steps.values()):
            raise ValueError("it must hold id, folder and steps")
        if not other.exists() or other.samefile(path):
            return known, steps
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s is damaged (%s): another run begins on the server", path, error)
    return "", {}


def _maker(name: str, config: Experiment, run_dir: Path) -> Callable[..., Logger]:
    if name == "csv":  # each start writes a version of its own: Lightning's logger deletes what it finds
        return lambda: pl.loggers.CSVLogger(run_dir, name="csv")
    if name == "tensorboard":
        return lambda: pl.loggers.TensorBoardLogger(run_dir, name="tensorboard", version="", default_hp_metric=False)
    package = {"comet": "comet_ml"}.get(name, name)
    if find_spec(package) is None:
        who, what = ("wandb.enabled=true", "'solo-ssl[wandb]'") if name == "wandb" else (f"loggers: {name}", package)
        raise EnvironmentFault(f"{who} needs the package {package}: pip install {what}")
    if name == "wandb":         # neither code nor its changes leave this machine, and no config, command line or screen does
        return lambda **goes_on: pl.loggers.WandbLogger(
            name=config.title,
            project=config.wandb.project,
            entity=config.wandb.entity,
            offline=config.wandb.offline,
            save_dir=run_dir,
            save_code=False,
            settings=WANDB,
            **goes_on,
        )
    kinds: dict[str, type[Logger]] = {"mlflow": pl.loggers.MLFlowLogger, "comet": pl.loggers.CometLogger}
    return kinds[name]
