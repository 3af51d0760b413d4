"""``python -m solo.bench train``: a recipe end to end, data and callbacks included, the first epoch left out (wall time)."""


from solo.bench.epochs import RECIPES, speed
from solo.bench.measure import table, told, write
from solo.errors import ConfigError, Parser


def main(argv: list[str]) -> None:
    parser = Parser("python -m solo.bench train", description=__doc__)
    parser.add_argument("--method", default="nnclr", help="whose CIFAR recipe")
    parser.add_argument("--epochs", type=int, default=3, help="of the run, at least 2")
    parser.add_argument("--no-write", action="store_true", help="do not append to bench/results.csv")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, e.g. data.dataset=digits")
    arguments = parser.parse_args(argv)
    if not (RECIPES / f"{arguments.method}.yaml").is_file():
        raise ConfigError(f"--method {arguments.method}: there is no {RECIPES}/{arguments.method}.yaml")
    if arguments.epochs < 2:
        raise ConfigError(f"--epochs must be at least 2, got {arguments.epochs}: the first one is left out")
    rows = speed("ET", arguments.method, arguments.overrides, arguments.epochs)
    print(table(rows))
    if not arguments.no_write:
        write(rows, setting=", ".join(told(arguments.overrides)))
