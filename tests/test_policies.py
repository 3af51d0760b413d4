"""Rules of the house that a machine can keep."""

import ast
import functools
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from solo import config
from solo.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "solo").rglob("*.py"))
RECIPES = sorted(path for path in (ROOT / "scripts").rglob("*.yaml") if path.parent.name != "augmentations")

BASE = {
    "errors", "registry", "console", "bars", "batch", "config", "names", "devices", "dist", "agreement", "awaited", "peers",
    "precision", "ranges", "pairs", "reading", "redaction", "schedules", "config_files", "files", "lease",
}
NETWORKS = ("nn", "batching", "compiling", "backbones", "towers", "representations", "optim", "checkpoint")
PARTS = BASE | {"kernels", "losses", *NETWORKS}
# What each part of solo may import, besides itself; a part that is not here may import everything.
MAY_IMPORT = {
    **dict.fromkeys(BASE, BASE),
    "kernels": BASE,
    "losses": BASE | {"kernels"},
    **dict.fromkeys(NETWORKS, PARTS),
    "methods": PARTS - {"config"},
    "data": BASE,
    "export": PARTS,
    "spared": BASE,
    "eval": PARTS | {"data", "export", "spared"},
    "strategy": BASE,
    "callbacks": PARTS | {"data", "eval", "export"},
    "compat": BASE,
    "launch": {"errors", "registry"},
    "torchrun": set(),
    "profiler": set(),
}
TOP = {"__init__", "bench", "certify", "continuing", "experiment", "loggers", "run", "start", "testing", "tuning"}
# Third-party roots that have one home.
HOMES = {
    "hydra": ("config.py", "config_files.py"),
    "omegaconf": ("config.py", "config_files.py"),
    "torchvision": ("data/", "bench/"),
    "triton": "kernels/",
    "submitit": "launch.py",
    "numba": ("data/", "kernels/", "bench/"),
    "llvmlite": "data/engines/jit.py",
    "h5py": "data/hdf5_content.py",
    "simplejpeg": "data/decoding.py",
    "kornia": "bench/peers/",
    "cv2": "bench/peers/",
    "nvidia": ("data/engines/dali_graph.py", "bench/peers/dali.py"),
    "wandb": "loggers.py",
    "umap": "eval/umap.py",
    "tqdm": "bars.py",
    "rich": (),         # where it is not installed, all runs: the GPU benchmark in an interpreter as it is
    "open_clip": "towers.py",
    "huggingface_hub": "towers.py",
}


def relative(path):
    return path.relative_to(ROOT / "solo").as_posix()


def part_of(path):
    """The part a file belongs to: solo/nn.py -> nn, solo/data/views.py -> data."""
    return relative(path).split("/")[0].removesuffix(".py")


def imports(path):
    """Every absolute module name a file imports, wherever it stands; ``from solo import x`` counts as ``solo.x``."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: imports are absolute"
            if node.module == "solo":
                yield from (f"solo.{alias.name}" for alias in node.names)
            else:
                yield node.module


def functions(path):
    return [node for node in nodes(path) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def calls(path):
    return [node for node in nodes(path) if isinstance(node, ast.Call)]


@functools.cache
def nodes(path):
    """All of a file's syntax."""
    return list(ast.walk(ast.parse(path.read_text())))


def each_source(rule):
    """One test of all files, whose failure names each that breaks the rule: a test of each would cost more than the rule."""

    def test():
        broken = []
        for path in SOURCES:
            try:
                rule(path)
            except AssertionError as error:
                broken.append(str(error))
        assert not broken, "\n".join(broken)

    test.__doc__ = rule.__doc__
    return test


@each_source
def test_imports_go_down_only(path):
    part = part_of(path)
    assert part in MAY_IMPORT or part in TOP, f"name the layer of solo/{part} in this test"
    allowed = MAY_IMPORT.get(part)
    used = {name.split(".")[1] for name in imports(path) if name.startswith("solo.")}
    assert allowed is None or used <= allowed | {part}, f"{relative(path)} reaches up to {sorted(used - allowed - {part})}"


@each_source
def test_third_party_roots_stay_at_home(path):
    roots = {name.split(".")[0] for name in imports(path)}
    for root, home in HOMES.items():
        assert root not in roots or relative(path).startswith(home), f"{relative(path)} imports {root}, which lives in {home}"


@each_source
def test_nothing_unsafe_or_silent(path):
    for call in calls(path):
        name = ast.unparse(call.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        line = f"{relative(path)}:{call.lineno} {name}"
        assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load"), line
        assert not name.endswith(("instantiate", "hub.load", "extractall", "unpack_archive")), line
        assert keywords.get("weights_only") != "False" and keywords.get("allow_pickle") != "True", line
        assert keywords.get("shell") != "True", line
        assert keywords.get("strict") != "False" or name == "zip", line
        if name == "torch.load":
            assert relative(path) == "reading.py" and keywords.get("weights_only") == "True", line
        assert not name.endswith("load_from_checkpoint"), line
    unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "torch.hub", "hydra.utils"}
    used = {".".join(name.split(".")[:depth]) for name in imports(path) for depth in (1, 2)}
    assert not used & unsafe, f"{relative(path)} imports {used & unsafe}"
    for node in nodes(path):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("torch.hub", "hydra.utils"), f"{relative(path)}:{node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            silent = all(isinstance(statement, (ast.Pass, ast.Continue)) for statement in node.body)
            assert not (broad and silent), f"{relative(path)}:{node.lineno} swallows every error"


@each_source
def test_asserts_only_narrow_types(path):
    """``python -O`` leaves them out: what a user can cause is raised, and nothing is done inside one."""
    if part_of(path) in ("bench", "testing", "certify"):        # their subject is whether something holds
        return

    def narrows(test):
        if isinstance(test, ast.BoolOp):
            return all(narrows(value) for value in test.values)
        if isinstance(test, ast.Compare):
            return isinstance(test.ops[0], ast.IsNot) and ast.unparse(test.comparators[0]) == "None"
        return isinstance(test, ast.Call) and ast.unparse(test.func) == "isinstance"

    for node in nodes(path):
        if isinstance(node, ast.Assert):
            assert narrows(node.test), f"{relative(path)}:{node.lineno} {ast.unparse(node)}"


@each_source
def test_sizes(path):
    lines = path.read_text().count("\n")
    assert lines <= 400, f"{relative(path)} has {lines} lines"
    for function in functions(path):
        length = function.end_lineno - function.lineno + 1
        assert length <= 80, f"{relative(path)}:{function.lineno} {function.name} has {length} lines"


@each_source
def test_public_signatures_are_typed(path):
    for function in functions(path):
        if function.name.startswith("_") and function.name != "__init__":
            continue
        where = f"{relative(path)}:{function.lineno} {function.name}"
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        bare = [argument.arg for argument in arguments if argument.annotation is None and argument.arg not in ("self", "cls")]
        assert not bare, f"{where}: no type for {bare}"
        assert function.returns is not None, f"{where}: no return type"


def test_methods_bring_neither_hydra_nor_data():
    """What ``import solo.methods`` pulls in of our own, followed file by file; `solo` itself imports nothing until asked."""
    modules = {path: f"solo/{relative(path)}".removesuffix(".py").removesuffix("/__init__") for path in SOURCES}
    by_module = {name.replace("/", "."): path for path, name in modules.items() if name != "solo"}
    seen, todo = set(), {name for name in by_module if name.startswith("solo.methods")}
    while todo:
        name = todo.pop()
        seen.add(name)
        reached = {other for wanted in imports(by_module[name]) for other in (wanted, wanted.rpartition(".")[0])}
        todo |= (reached & set(by_module)) - seen
    assert {part_of(by_module[name]) for name in seen} <= PARTS - {"config"} | {"methods"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(ROOT / "scripts").as_posix())
def test_recipes_compose(path):
    mandatory = sorted(OmegaConf.missing_keys(OmegaConf.load(path)))
    assert config.load(path, [f"{key}=given" for key in mandatory])
    for key in mandatory:
        with pytest.raises(ConfigError, match=re.escape(key)):
            config.load(path, [f"{other}=given" for other in mandatory if other != key])


PRETRAIN = [path for path in RECIPES if path.is_relative_to(ROOT / "scripts" / "pretrain")]


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda path: path.relative_to(ROOT / "scripts" / "pretrain").as_posix())
def test_recipes_say_what_they_are(path):
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    folder = path.parent.relative_to(ROOT).as_posix()
    where = "" if folder == "scripts/pretrain" else f"--config-path {folder} "
    assert f"# command:   python main_pretrain.py {where}--config-name {path.name}" in header
    for heading in ("# hardware:", "# hours:", "# published:"):
        assert heading in header, f"no {heading} in the header"
    recipe = config.load(path, ["data.train_path=x", "data.val_path=x"])
    assert f"{path.stem}-".startswith(f"{recipe['method']}-"), "a recipe is called METHOD.yaml or METHOD-VARIANT.yaml"
    assert sum(view.get("num_crops", 1) for view in recipe["augmentations"]) >= 2


def test_224_pixel_views_are_the_same_everywhere():
    folders = [ROOT / "scripts" / "pretrain" / name / "augmentations" for name in ("imagenet-100", "imagenet", "custom")]
    for file in folders[0].glob("*.yaml"):
        assert len({(folder / file.name).read_text() for folder in folders if (folder / file.name).exists()}) == 1, file.name
