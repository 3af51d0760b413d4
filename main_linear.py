"""Linear evaluation and fine-tuning: ``python main_linear.py --config-name linear.yaml checkpoint=PATH [overrides]``."""

from typing import Any

from solo.config import main


@main(config_path="scripts/linear", config_name="linear.yaml")
def command(values: dict[str, Any]) -> None:
    from solo.callbacks.health import FiniteGuard
    from solo.callbacks.metrics import MetricsLogger
    from solo.callbacks.progress import RunProgress
    from solo.callbacks.signals import SignalGuard, ValidationGuard
    from solo.console import quiet_libraries
    from solo.eval.protocol import evaluate_linear
    from solo.experiment import TRAINER_ARGUMENTS

    quiet_libraries()
    guard = SignalGuard()
    evaluate_linear(values, TRAINER_ARGUMENTS, [FiniteGuard(), MetricsLogger(), RunProgress(), guard, ValidationGuard(guard)])


if __name__ == "__main__":
    command()
