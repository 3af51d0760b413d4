"""A two-dimensional map of a checkpoint's features: ``python main_umap.py checkpoint=PATH [overrides]``."""

from typing import Any

from solo.config import main


@main(config_path="scripts/umap", config_name="umap.yaml")
def command(values: dict[str, Any]) -> None:
    from solo.console import quiet_libraries
    from solo.eval.umap import evaluate_umap

    quiet_libraries()
    evaluate_umap(values)


if __name__ == "__main__":
    command()
