"""Linear evaluation and fine-tuning: ``python main_linear.py --config-name linear.yaml checkpoint=PATH [overrides]``."""

from typing import Any

from solo.callbacks.health import FiniteGuard
from solo.callbacks.metrics import MetricsLogger
from solo.callbacks.progress import RunProgress
from solo.config import main
from solo.eval.protocol import evaluate_linear
from solo.experiment import TRAINER_ARGUMENTS


@main("scripts/linear", "linear.yaml")
def command(values: dict[str, Any]) -> None:
    watching = [FiniteGuard(), MetricsLogger(), RunProgress()]
    evaluate_linear(values, TRAINER_ARGUMENTS, watching)


if __name__ == "__main__":
    command()
