"""Pretrain a method: ``python main_pretrain.py --config-name all4one.yaml [--config-path DIR] [key=value ...]``."""

from typing import Any

from solo.config import main


@main(config_path="scripts/pretrain", config_name="all4one.yaml")
def command(values: dict[str, Any]) -> None:
    from solo.run import main as pretrain

    pretrain(values)


if __name__ == "__main__":
    command()
