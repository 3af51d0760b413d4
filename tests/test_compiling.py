"""`compile: true`: other speed, same numbers, same checkpoints."""

import os

import pytest
import torch

from solo.compiling import compile_networks
from solo.errors import EnvironmentFault
from solo.testing.case import Case
from tests.forks import apart


def compiled_and_plain(mode, backend):
    compiled, own = [], torch.nn.Module.compile

    def compile(self):
        compiled.append(type(self).__name__)
        own(self, backend=backend)

    torch.nn.Module.compile = compile
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    changes = {"max_epochs": 1, "optimizer": {"lr": 0.1, "kwargs": {"eta": 0.02}}, "view_batching": mode}
    fast, plain = Case("nnclr").train(compile=True, **changes), Case("nnclr").train(**changes)
    assert compiled == ["ResNet", "Sequential", "Sequential"]
    torch.testing.assert_close(fast["state_dict"], plain["state_dict"], rtol=1e-3, atol=1e-4)
    Case("nnclr").build().load_state_dict(fast["state_dict"])
    other = any(not torch.equal(a, b) for a, b in zip(fast["state_dict"].values(), plain["state_dict"].values(), strict=True))
    assert other or backend == "aot_eager"


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "backend"), [("separate", "aot_eager"), ("concat", "inductor")])
def test_a_compiled_run_leaves_the_same_checkpoint(mode, backend):
    """16 bits of agreement would do for training; these are float32 sums in another order over 8 steps.

    What Inductor makes of a graph does not depend on the mode, and takes a minute: the other one is only traced. In a
    process of its own, because after it no fork can go backwards.
    """
    apart(compiled_and_plain, mode, backend)


def test_no_compiler_is_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(EnvironmentFault, match=r"compile=true needs a C\+\+ compiler \(g\+\+ or clang\+\+\)"):
        compile_networks(Case("nnclr").build(), torch.device("cpu"))
    monkeypatch.setenv("CXX", "nothing")
    with pytest.raises(EnvironmentFault, match=r"\(nothing\)"):
        compile_networks(Case("nnclr").build(), torch.device("cpu"))


@pytest.mark.slow
def test_names_stay():
    model = Case("all4one").build()
    names = list(model.state_dict())
    compile_networks(model, torch.device("cpu"))
    assert list(model.state_dict()) == names and model._compiled_call_impl is None
    assert all(child._compiled_call_impl for child in (model.backbone, model.projector, model.transformer, model.teacher))
