"""The programs in docs/ run as they stand."""

import dataclasses
import importlib
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from solo import config
from solo.batch import Batch
from solo.data.config import DataConfig
from solo.data.datasets import DATASETS
from solo.errors import Interrupted, SoloError
from solo.eval.linear import LinearConfig
from solo.methods import METHODS
from solo.methods.unigrad import CONSTANTS
from solo.nn import Momentum
from solo.representations import REPRESENTATIONS, represent
from solo.testing import CHECKS
from tests import forks
from tests.faults import named

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Saves the one Python program of a document as an importable module."""

    def save(document, module):
        (source,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / document).read_text(), flags=re.DOTALL)
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()

    return save


def test_a_method_in_one_file(program):
    program("add_a_method.md", "sage")
    sage = METHODS["sage:Sage"]
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
    backbone.num_features = 8
    method = sage(backbone, sage.Config(proj_hidden_dim=16, proj_output_dim=8, pred_hidden_dim=4))
    views = [torch.randn(6, 3, 2, 2), torch.randn(6, 3, 2, 2)]
    out = method.losses(Batch(views, torch.zeros(6, dtype=torch.long), torch.arange(6)))
    assert out["feats"].shape == (12, 8) and -1 <= out["loss"] <= 1
    out["loss"].backward()
    assert all(parameter.grad is not None for parameter in method.parameters())
    with pytest.raises(ValueError, match="bottleneck"):
        sage.Config(pred_hidden_dim=4096)


@pytest.mark.slow
def test_its_contract(program, tmp_path):
    program("add_a_method.md", "sage")
    (test,) = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "add_a_method.md").read_text(), flags=re.DOTALL)
    (tmp_path / "test_sage.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_sage.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = forks.run(command, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and f"{len(CHECKS)} passed" in done.stdout, done.stdout


def test_its_command_line():
    words = re.search(r"--config-name (nnclr.yaml) (method=\S+) '(~\S+)'", (ROOT / "docs" / "add_a_method.md").read_text())
    values = config.load(ROOT / "scripts" / "pretrain" / words[1], [words[2], words[3]])
    assert values["method"] == "sage:Sage" and "method_kwargs" not in values


def test_a_representation_in_five_lines(program):
    program("methods/mvmr.md", "colours")
    document = (ROOT / "docs" / "methods" / "mvmr.md").read_text()
    (override,) = re.findall(r"'(method_kwargs.representations=.*)'", document)
    values = config.load(ROOT / "scripts" / "pretrain" / "mvmr.yaml", [override])
    kwargs = config.bind(METHODS["mvmr"].Config, values["method_kwargs"], "method_kwargs")
    assert kwargs.representations == {"raw": 1.0, "colours:mean_colour": 0.5}
    images = torch.randn(4, 3, 8, 8)
    try:
        for name in ("colours:mean_colour", "mean_colour"):
            (block,) = represent(name, images)
            assert torch.equal(block, images.mean((2, 3)))
    finally:
        REPRESENTATIONS._rows.pop("mean_colour", None)


def test_a_dataset_in_one_row(program, tmp_path):
    program("add_a_dataset.md", "cells")
    images = np.zeros((5, 64, 64, 3), np.uint8)
    labels = np.array([0, 1, 2, -1, 0])
    np.savez(tmp_path / "cells.npz", train_images=images, train_labels=labels, test_images=images[:2], test_labels=labels[:2])
    source = DATASETS["cells:CELLS"].open(DataConfig(dataset="cells:CELLS", train_path=str(tmp_path)), False)
    assert len(source) == 2 and source.load(1).shape == (64, 64, 3) and source.classes[1] == "white"
    assert DATASETS["cells"] is DATASETS["cells:CELLS"]


def test_documents_name_recipes_and_documents_that_exist():
    for document in [*(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md"]:
        text = document.read_text()
        for link in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (document.parent / link).exists(), f"{document.name} links to {link}"
        for folder, name in re.findall(r"--config-path (\S+) --config-name (\S+\.yaml)", text):
            assert (ROOT / folder / name.rstrip("`")).is_file(), f"{document.name} names {folder}/{name}"


def table(page, heading):
    """The rows below a heading of a page, without their header, as lists of cells."""
    text = re.search(rf"^\| {heading} \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)[1]
    return [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in text.splitlines()]


def default(text):
    """A cell's value: YAML, ``none``, or the ends of a teacher's momentum."""
    if ends := re.fullmatch(r"(\S+) -> (\S+)", text):
        return Momentum(base_tau=float(ends[1]), final_tau=float(ends[2]))
    return None if text == "none" else yaml.safe_load(text.replace("`", ""))


@pytest.mark.parametrize("name", sorted({field.stem for field in (ROOT / "docs" / "methods").glob("*.md")}))
def test_fields_and_defaults_of_a_methods_page_are_the_codes(name):
    page, found = (ROOT / "docs" / "methods" / f"{name}.md").read_text(), {}
    for names, defaults, *_ in table(page, "field"):
        if fields := re.findall(r"`(\w+)`", names.split(" (")[0]):
            values = defaults.split(", ") if len(fields) > 1 and "," in defaults else [defaults] * len(fields)
            found |= dict(zip(fields, map(default, values), strict=True))
    config = METHODS[name].Config()
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if name == "unigrad":                                       # its forms' constants have a table of their own
        own = {field: value for field, value in own.items() if all(field not in row for row in CONSTANTS.values())}
    assert found == own


def test_constants_of_unigrads_forms_are_the_codes():
    page, found = (ROOT / "docs" / "methods" / "unigrad.md").read_text(), {}
    for forms, *_, constants in table(page, "`form`"):
        for form in re.findall(r"`(\w+)`", forms):
            found[form] = {field: default(value) for field, value in re.findall(r"`(\w+)` (?:[a-z] )?([\d.]+)", constants)}
    assert found == CONSTANTS


def test_each_method_has_a_page():
    shipped = {name for name in METHODS if METHODS[name].__module__.startswith("solo.")}
    assert {page.stem for page in (ROOT / "docs" / "methods").glob("*.md")} == shipped


def test_unigrads_published_linear_evaluation_composes():
    """LARC with trust 0.001 and no clipping, 0.1 per 256 of 4096 images, a cosine over 90 epochs from the first step."""
    (command,) = re.findall(r"^    (python main_linear\.py .*)$", (ROOT / "docs/methods/unigrad.md").read_text(), re.MULTILINE)
    _, _, flag, name, *overrides = shlex.split(command)
    assert flag == "--config-name"
    composed = config.load(ROOT / "scripts" / "linear" / name, overrides)
    epochs = composed.pop("max_epochs")
    linear = config.bind(LinearConfig, composed)
    optimizer = linear.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.batch_size, optimizer.weight_decay) == ("larc", 0.1, 4096, 0)
    assert optimizer.kwargs == {"momentum": 0.9, "trust_coefficient": 0.001, "clip": False}
    schedule = linear.scheduler
    assert (epochs, schedule.name, schedule.warmup_epochs, schedule.min_lr) == (90, "warmup_cosine", 0, 0)


@pytest.mark.slow
def test_commands_of_the_evaluation_page_compose():
    commands = re.findall(r"^python (main_\w+\.py) (.*)$", (ROOT / "docs" / "evaluation.md").read_text(), flags=re.MULTILINE)
    assert len(commands) >= 8
    for script, words in commands:
        folder = ROOT / "scripts" / script.removeprefix("main_").removesuffix(".py")
        default = re.search(r'config_name="(\S+)"', (ROOT / script).read_text())[1]
        name, *overrides = [word for word in words.split() if word != "--config-name"]
        if not name.endswith(".yaml"):
            name, overrides = default, [name, *overrides]
        assert config.load(folder / name, overrides), (script, words)


def test_exit_codes_of_the_error_page():
    rows = re.findall(r"^\| (\d+) \| `([a-z ]+)`", (ROOT / "docs" / "errors.md").read_text(), flags=re.MULTILINE)
    kinds = [SoloError, *SoloError.__subclasses__()]
    raised = {(kind.exit_code, kind.kind) for kind in kinds if kind is not Interrupted}
    assert {(int(code), name) for code, name in rows} == raised
    assert Interrupted.kind == "interrupted" and Interrupted("", 15).exit_code == 143


CATALOGUE = {"A": 25, "B": 20, "C": 26, "D": 10, "E": 12, "F": 8}      # faults of each kind that were asked for


def test_each_fault_of_the_catalogue_has_a_row():
    page = (ROOT / "docs" / "reliability.md").read_text()
    named = set()
    for first in re.findall(r"^\| ((?:[A-F]\d+[-, ]*)+)", page, re.MULTILINE):
        for letter, start, _, end in re.findall(r"([A-F])(\d+)(-[A-F](\d+))?", first):
            named |= {f"{letter}{number}" for number in range(int(start), int(end or start) + 1)}
    wanted = {f"{letter}{number}" for letter, count in CATALOGUE.items() for number in range(1, count + 1)}
    assert len(wanted) == 101 and not wanted - named, sorted(wanted - named)


def test_tests_that_the_reliability_page_names_are_there():
    """A name that ends with dots stands for those that begin so."""
    page = (ROOT / "docs" / "reliability.md").read_text()
    sources = {path: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    defined = set(re.findall(r"^    ?(?:async )?def (\w+)|^def (\w+)", "\n".join(sources.values()), re.MULTILINE))
    functions = {name for pair in defined for name in pair if name}
    for name, dots in re.findall(r"(?<![\w/])(test_\w+)(\.\.\.)?(?!\.py|\w|/)", page):
        found = name in functions or dots and any(each.startswith(name) for each in functions)
        assert found or any(path.stem == name for path in sources), name
    for name in re.findall(r"(?:tests/)?((?:\w+/)*test_\w+\.py)", page):
        assert any(path.as_posix().endswith(name) for path in sources), name


def test_the_tests_that_it_names_are_those_of_faults():
    of_faults, tests = named(), ROOT / "tests"
    for file, function in [("test_chaos.py", "test_two_hundred_kills"), ("attacks/test_attacks.py", "test_refused"),
                           ("data/test_bad_shares.py", "any"), ("data/test_module.py", "any"), ("test_certify.py", "any"),
                           ("data/test_hdf5.py", "test_an_error_that_passes_is_tried_again")]:
        assert (tests / file, function) in of_faults, file
    for file, function in [("test_step_counts.py", "test_operations_of_a_step"), ("data/test_hdf5.py", "any"),
                           ("bench/test_peers.py", "any"), ("eval/test_umap.py", "test_what_is_written")]:
        assert (tests / file, function) not in of_faults, file
