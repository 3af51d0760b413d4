"""No value of SCE's, UniGrad's and MV-MR's golden files stays unread: a test asks for it by name, or it is waived by name."""

import inspect
import itertools
from fnmatch import fnmatch

import numpy as np
import pytest
import torch

from tests import test_optim, test_representations
from tests.conftest import Golden, load_golden, shared
from tests.eval import test_ap, test_knn
from tests.losses import test_mvmr, test_sce, test_unigrad
from tests.methods import test_sce as test_sce_method

FILES = ("sce_*", "unigrad_*", "mvmr_*", "opt_lars_*", "opt_larc_*", "schedules_*", "voc_ap_*", "knn_*")
MODULES = (test_ap, test_knn, test_mvmr, test_optim, test_representations, test_sce, test_sce_method, test_unigrad)
WAIVED = {
    ("mvmr_repr_*", "dct2"): "the released configs have no representation by cosines, and we have none",
    ("mvmr_repr_*", "patch_checksum"): "checks the official code's cutting into patches, which no released config uses",
}


class NotOurs(Exception):
    """A test asked for a file of another family."""


class Asked(Golden):
    """Golden values that note which are asked for by name."""

    def __init__(self, golden, names):
        super().__init__(golden)
        self.params, self.names = golden.params, names

    def __getitem__(self, name):
        self.names.add(name)
        return super().__getitem__(name)


def axis(mark):
    """The cases of one ``parametrize`` as keyword arguments."""
    names = mark.args[0].replace(" ", "").split(",")
    for case in mark.args[1]:
        values = case.values if isinstance(case, type(pytest.param())) else case if len(names) > 1 else [case]
        yield dict(zip(names, values, strict=True))


def calls(function):
    """Keyword arguments of each case of a test, in float64 where it runs in several types."""
    axes = [axis(mark) for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    cases = ({key: value for part in parts for key, value in part.items()} for parts in itertools.product(*axes))
    return [case for case in cases if case.get("dtype", torch.float64) == torch.float64]


@pytest.fixture(scope="module")
def asked():
    """File -> names, after every test that takes golden values and nothing else but its cases."""
    seen = {}

    def load(name):
        if not any(fnmatch(name, pattern) for pattern in FILES):
            raise NotOurs
        return Asked(load_golden(name), seen.setdefault(name, set()))

    for module in MODULES:
        for name, function in inspect.getmembers(module, inspect.isfunction):
            wanted = set(inspect.signature(function).parameters)
            for case in calls(function) if name.startswith("test_") and "golden" in wanted else ():
                if wanted == {"golden", *case}:
                    try:
                        function(golden=load, **case)
                    except NotOurs:
                        continue
    return seen


@pytest.mark.slow
def test_every_golden_value_is_asked_for_or_waived(asked):
    found = {path.stem: path for pattern in FILES for path in shared("golden").glob(f"{pattern}.npz")}
    assert len(found) == 37
    unread = set()
    for name, path in found.items():
        with np.load(path) as file:
            outputs = {key for key in file.files if key != "params" and file[key].dtype != np.float16}     # those are inputs
        unread |= {(name, key) for key in outputs - asked.get(name, set())}
    waived = {(name, key) for name in found for pattern, key in WAIVED if fnmatch(name, pattern)}
    assert unread == waived
