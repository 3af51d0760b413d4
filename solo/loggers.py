"""Where a run's metrics go: Lightning's loggers by short names. None of them can end a run."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger

from solo.errors import EnvironmentFault
from solo.experiment import Experiment
from solo.spared import Spared

SERVERS = ("wandb", "mlflow", "comet")      # asked over a network; the others write files here, which nobody waits for
MORTAL = ("tensorboard",)                   # its writer's thread ends at the first failure

WANDB = {"disable_code": True, "disable_git": True, "x_disable_meta": True, "console": "off", "init_timeout": 30}


def loggers(config: Experiment, run_dir: Path) -> list[Logger]:
    """A run's loggers, writing below its directory where they can.

    Raises:
        EnvironmentFault: a package is missing.
    """
    names = [*config.loggers, *(["wandb"] if config.wandb.enabled else [])]
    return [Spared(name, _maker(name, config, run_dir), name in SERVERS, name in MORTAL) for name in names]


def _maker(name: str, config: Experiment, run_dir: Path) -> Callable[[], Logger]:
    if name == "csv":  # each start writes a version of its own: Lightning's logger deletes what it finds
        return lambda: pl.loggers.CSVLogger(run_dir, name="csv")
    if name == "tensorboard":
        return lambda: pl.loggers.TensorBoardLogger(run_dir, name="tensorboard", version="", default_hp_metric=False)
    package = {"comet": "comet_ml"}.get(name, name)
    if find_spec(package) is None:
        who, what = ("wandb.enabled=true", "'solo-ssl[wandb]'") if name == "wandb" else (f"loggers: {name}", package)
        raise EnvironmentFault(f"{who} needs the package {package}: pip install {what}")
    if name == "wandb":         # neither code nor its changes leave this machine, and no config, command line or screen does
        return lambda: pl.loggers.WandbLogger(
            name=config.title,
            project=config.wandb.project,
            entity=config.wandb.entity,
            offline=config.wandb.offline,
            save_dir=run_dir,
            save_code=False,
            settings=WANDB,
        )
    kinds: dict[str, type[Logger]] = {"mlflow": pl.loggers.MLFlowLogger, "comet": pl.loggers.CometLogger}
    return kinds[name]
