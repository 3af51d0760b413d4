"""k-NN accuracy of a checkpoint: ``python main_knn.py checkpoint=PATH [overrides]``."""

from typing import Any

from solo.config import main


@main(config_path="scripts/knn", config_name="knn.yaml")
def command(values: dict[str, Any]) -> None:
    from solo.console import quiet_libraries
    from solo.eval.offline import evaluate_knn

    quiet_libraries()
    evaluate_knn(values)


if __name__ == "__main__":
    command()
