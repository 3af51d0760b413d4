"""Every single-letter slip in every key of every shipped config, and of every method, is refused, and nearly always with the
right key offered."""

import copy
import dataclasses
import functools
import re
import string
from typing import get_args, get_type_hints

import pytest
import torch

from solo import backbones, config
from solo.config import bind
from solo.data.config import DataConfig
from solo.errors import ConfigError
from solo.eval.offline import KNNEvaluation
from solo.eval.protocol import _bound
from solo.eval.umap import UMAPEvaluation
from solo.experiment import TRAINER_ARGUMENTS, experiment, schema_of
from solo.methods import METHODS
from solo.names import nearest, one_slip
from solo.representations import REPRESENTATIONS
from tests.conftest import ROOT

EVALUATIONS = {"knn": KNNEvaluation, "umap": UMAPEvaluation}
CONFIGS = [path for path in sorted((ROOT / "scripts").rglob("*.yaml")) if path.parent.name != "augmentations"]

UNKNOWN = re.compile(r"(?:unknown key )?(?:\S+\.)?(\S*?)(?::| \(| is unknown: )")       # the key's own name, without its path


def judge(file, values):
    """What the file's own command does with its values before any work; ``bench`` files are parts of a pretraining."""
    if file.parent.name == "linear":
        data = values.get("data", {})
        _bound({"checkpoint": "x", **values}, TRAINER_ARGUMENTS)
        bind(DataConfig, data, "data")
    elif schema := EVALUATIONS.get(file.parent.name):
        bind(schema, {"checkpoint": "x", **values})
    else:
        backbones.build(experiment({"method": "nnclr", **values}).backbone)         # timm knows the keys of its kwargs


def slips(word, letters):
    """Every word one slip away: a letter left out, added, mistaken, or swapped with the next."""
    for i in range(len(word) + 1):
        yield from (word[:i] + letter + word[i:] for letter in letters)
        if i < len(word):
            yield word[:i] + word[i + 1 :]
            yield from (word[:i] + letter + word[i + 1 :] for letter in letters)
        yield word[:i] + word[i + 1 : i + 2] + word[i : i + 1] + word[i + 2 :]


def blocks(values, path=()):
    """Paths of all dictionaries that have keys, through lists."""
    if isinstance(values, dict) and values:
        yield path
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, (dict, list)):
            yield from blocks(value, (*path, key))


def inside(values, path):
    for key in path:
        values = values[key]
    return values


def renamed(values, names):
    """The config with keys, given by their paths, called otherwise, in each of several ways."""
    values = copy.deepcopy(values)
    for path in {place[:-1] for place in names}:
        block = inside(values, path)
        changed = {name: value for key, value in block.items() for name in names.get((*path, key), [key])}
        block.clear()
        block.update(changed)
    return values


def words(path):
    return ".".join(key if isinstance(key, str) else "[]" for key in path)


def said_of(file, values):
    try:
        judge(file, values)
    except ConfigError as error:
        return str(error)


def judged(letters):
    """(typed, meant, what was said or None where it was taken) for each slip in each key of the shipped configs.

    All errors are told at once, so all slips in each key are judged together, but for those inside of a block whose own key has
    some, and alone where nothing names them.
    """
    seen = set()
    for file in CONFIGS:
        values = config.load(file, ["data.train_path=somewhere"] * (file.parts[-3] == "pretrain"))
        command, wanted = file.relative_to(ROOT / "scripts").parts[0], {}
        for path in blocks(values):
            keys = set(inside(values, path))
            places = {(command, words((*path, key))): key for key in keys}          # each command has a schema of its own
            new = [key for place, key in places.items() if place not in seen]
            wanted |= {(*path, key): sorted({*slips(key, letters)} - keys) for key in new}
            seen |= set(places)
        while wanted:
            names, taken = {}, set()
            for place, typed in wanted.items():
                inside_another = any(place[:depth] in names for depth in range(1, len(place)))
                if not inside_another and taken.isdisjoint(typed):
                    names[place] = typed
                    taken |= {*typed}
            lines = {}
            for line in (said_of(file, renamed(values, names)) or "").splitlines():
                if told := UNKNOWN.match(line):
                    lines.setdefault(told[1], []).append(line)
            for place in names:
                for typed in wanted.pop(place):
                    yield typed, place[-1], "\n".join(lines.get(typed, [])) or said_of(file, renamed(values, {place: [typed]}))


def schemas(schema, path=()):
    """Paths of a dataclass and of those that its keys may hold."""
    yield path, schema
    for name, hint in get_type_hints(schema).items():
        for kind in filter(dataclasses.is_dataclass, (hint, *get_args(hint))):
            yield from schemas(kind, (*path, name))


def judged_by_methods(letters):
    """The same for each key of each method's own schema, given to that method."""
    for method in METHODS:
        for path, schema in schemas(schema_of(method)):
            keys = {field.name for field in dataclasses.fields(schema)}
            for meant in keys:
                for typed in sorted({*slips(meant, letters)} - keys):
                    given = functools.reduce(lambda block, key: {key: block}, reversed(path), {typed: 1.0})
                    try:
                        bind(schema_of(method), given, "method_kwargs")
                        yield typed, meant, None
                    except ConfigError as error:
                        yield typed, meant, str(error)


def stated():
    """The page's figures, of configs by one letter and by all, and of methods so: slips, and those without the right key."""
    (row,) = re.findall(r"^\| F1 an unknown key.*", (ROOT / "docs/reliability.md").read_text(), re.MULTILINE)
    found = re.findall(r"([\d,]+) slips, all but (\d+)", row)
    return [(int(slips.replace(",", "")), int(wrong)) for slips, wrong in found]


@pytest.mark.parametrize("letters", ["e", pytest.param(string.ascii_lowercase + "_", marks=pytest.mark.slow)])
@pytest.mark.parametrize("judge_all, place", [(judged, 0), (judged_by_methods, 2)], ids=["configs", "methods"])
def test_every_slip(judge_all, place, letters):
    least, wrong = stated()[place + (len(letters) > 1)]
    found = list(judge_all(letters))
    taken = [(typed, meant) for typed, meant, said in found if said is None]
    assert len(found) >= least and not taken, taken[:10]
    right = [any(typed in line and line.endswith(f"{meant}?") for line in said.splitlines()) for typed, meant, said in found]
    print(f"{len(found)} slips refused, {sum(right)} with the right key offered")
    assert len(right) - sum(right) <= wrong and sum(right) >= 0.95 * len(right)


@pytest.mark.parametrize("value", [1, None], ids=["a value", "null"])
@pytest.mark.parametrize("name, typed, meant", [
    ("resnet18", "chanels", "channels"), ("vit_tiny_patch16_224", "img_sise", "img_size"),
    ("efficientnet_b0", "drop_rat", "drop_rate"), ("resnet18", "qqqq", None),
])
def test_a_slip_in_what_a_timm_model_is_given(name, typed, meant, value):
    with pytest.raises(ConfigError) as found:
        backbones.build(backbones.BackboneConfig(name=name, kwargs={typed: value}))
    end = f": did you mean backbone.kwargs.{meant}?" if meant else " (known: "
    assert str(found.value).startswith(f"unknown key backbone.kwargs.{typed}{end}") and "\n" not in str(found.value)


def test_what_a_timm_builder_knows_beside_the_model_is_taken():
    model = backbones.build(backbones.BackboneConfig(name="mobilenetv3_small_050", kwargs={"bn_eps": 0.5, "drop_rate": None}))
    assert {module.eps for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)} == {0.5}


@pytest.mark.slow
@pytest.mark.parametrize("meant", list(REPRESENTATIONS))
def test_a_slip_in_the_name_of_a_representation(meant):
    for typed in sorted({*slips(meant, "e")} - {*REPRESENTATIONS, ""}):
        with pytest.raises(ConfigError, match=f"^method_kwargs.representations: no '{typed}' in .*, did you mean '{meant}'?"):
            bind(METHODS["mvmr"].Config, {"representations": {typed: 1.0}}, "method_kwargs")


@pytest.mark.parametrize("typed, meant, is_one", [
    ("lr", "lr", True), ("l", "lr", True), ("lrr", "lr", True), ("rl", "lr", True), ("lx", "lr", True),
    ("lrxx", "lr", False), ("", "lr", False), ("tuaa", "tau", False), ("tua", "tau", True), ("abdc", "abcd", True),
    ("badc", "abcd", False),
])
def test_one_slip(typed, meant, is_one):
    assert one_slip(typed, meant) is is_one


def test_nearest_prefers_a_slip_to_a_likeness():
    assert nearest("lx", ["batch_size", "lr", "name"]) == "lr"
    assert nearest("LR", ["batch_size", "lr"]) == "lr"
    assert nearest("optimiser", ["optimizer", "opt"]) == "optimizer"
    assert nearest("qqqq", ["lr", "name"]) is None
