"""k-NN accuracy of a checkpoint: ``python main_knn.py checkpoint=PATH [overrides]``."""

from typing import Any

from solo.config import main
from solo.eval.offline import evaluate_knn


@main("scripts/knn", "knn.yaml")
def command(values: dict[str, Any]) -> None:
    evaluate_knn(values)


if __name__ == "__main__":
    command()
