"""A peer's own code beside ours: a checkout in its own process, made here of the formulas that everyone writes."""

import pytest
import torch

from solo import optim
from solo.bench import loss, step
from solo.bench.loss import Pair, search_pair, simclr_pair
from solo.bench.peers.checkout import Checkout
from solo.errors import ConfigError, EnvironmentFault, SoloError

NNCLR = """
import torch
import torch.nn.functional as F


def nnclr_loss_func(nn, p, temperature):
    logits = F.normalize(nn, dim=1) @ F.normalize(p, dim=1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(p)))
"""
SIMCLR = """
import torch


def simclr_loss_func(z, indexes, temperature):
    print("words on standard output")
    z = torch.nn.functional.normalize(z, dim=1)
    own = torch.eye(len(z), dtype=torch.bool)
    logits = (z @ z.T / temperature).masked_fill(own, -torch.inf)
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))
"""
LARS = """
import torch


class LARS(torch.optim.SGD):
    def __init__(self, params, lr, momentum, weight_decay, eta, clip_lr, exclude_bias_n_norm):
        super().__init__(params, lr=lr, momentum=momentum)
        self.own = weight_decay, eta

    def step(self):
        decay, eta = self.own
        for p in self.param_groups[0]["params"]:
            if p.ndim > 1:
                r = p.norm() / (p.grad.norm() + decay * p.norm() + 1e-8) * eta
                p.grad = p.grad.add(p.detach(), alpha=decay) * min(r / self.param_groups[0]["lr"], 1)
        super().step()
"""
OLD_LARS = """
class LARSWrapper:
    def __init__(self, optimizer, eta, clip, exclude_bias_n_norm):
        self.optimizer, self.eta = optimizer, eta

    def step(self):
        (group,) = self.optimizer.param_groups
        decay, group["weight_decay"] = group["weight_decay"], 0
        for p in group["params"]:
            if p.ndim > 1:
                r = self.eta * p.norm() / (p.grad.norm() + decay * p.norm() + 1e-8)
                p.grad += decay * p.detach()
                p.grad *= min(r / group["lr"], 1)
        self.optimizer.step()
        group["weight_decay"] = decay
"""
FILES = {
    "__init__.py": "import not_installed", "losses/__init__.py": "", "utils/__init__.py": "import not_installed_either",
    "losses/nnclr.py": NNCLR, "losses/simclr.py": SIMCLR, "losses/barlow.py": "import not_here", "utils/lars.py": LARS,
    "losses/vicreg.py": "def vicreg_loss_func(z1, z2, *weights):\n    return (z1 * z2).mean()",
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peer")
    for name, text in FILES.items():
        file = folder / "solo" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


@pytest.fixture(scope="module")
def peer(path):
    with Checkout(path, "loss") as found:
        yield found


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [lambda: simclr_pair(32), lambda: loss.nnclr_pair(16)], ids=["nt_xent", "nnclr"])
def test_its_own_code_is_checked_and_timed(pair, peer):
    (row,) = loss._against(pair(), peer, 2)
    assert row.peer == "solo-learn's own code" and row.pairs == 2 and len(row.ratios) == 2 and row.value > 0 < row.peer_value


@pytest.mark.slow
def test_another_value_stops_the_bench(peer):
    z = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    with pytest.raises(SoloError, match="ours and the peer's differ"):
        loss._against(Pair("L2", "VICReg", lambda a, b: (a * b).sum(), lambda a, b: a, z, "vicreg"), peer, 1)


@pytest.mark.slow
def test_what_cannot_be_imported_is_left_out_with_a_word(peer, capsys):
    z = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    assert loss._against(Pair("L2", "Barlow", lambda a, b: (a * b).sum(), lambda a, b: a, z, "barlow"), peer, 1) == []
    said = "Barlow is left out: solo-learn's own code says ModuleNotFoundError: No module named 'not_here'"
    assert said in capsys.readouterr().out
    assert loss._against(search_pair(2, 64, 5), peer, 1) == [] == capsys.readouterr().out.splitlines()     # it has none


@pytest.mark.slow
@pytest.mark.parametrize(("text", "said"), [
    (LARS, None),
    (LARS.replace("+ decay *", "+ 2 * decay *"), "where 0 is allowed"),
    (LARS.replace("1e-8) * eta", "1e-8)").replace("r = p", "r = eta * p"), "where 0 is allowed"),
    (OLD_LARS, None),
    (OLD_LARS.replace("+ decay *", "+ 2 * decay *"), "where 1e-06 is allowed"),
    ("", "no attribute 'LARSWrapper'"),
], ids=["published", "other decay", "other order", "old", "old, other decay", "none"])
def test_steps_of_its_lars(text, said, path, capsys, monkeypatch):
    monkeypatch.setattr(step, "Step", Small)
    (path / "solo" / "utils" / "lars.py").write_text(text)
    if said:
        with pytest.raises(SoloError, match=said):
            step.beside(path, 1)
    else:
        (row,) = step.beside(path, 2)
        assert row.id == "S4" and row.pairs == 2 and "after 3 steps a weight differs by" in capsys.readouterr().out


def test_a_process_that_dies_is_what_is_reported(path):
    with pytest.raises(EnvironmentFault, match="its process ended with -9"), Checkout(path, "loss") as peer:
        peer._process.kill()
        peer._process.wait()
        peer.rate()


class Small:
    """What `step.beside` takes of a step."""

    def __init__(self, *_, **__):
        image = torch.randn(128, 128, 3, 3).to(memory_format=torch.channels_last)
        weights = [x.requires_grad_() for x in (torch.randn(4, 3), torch.randn(3), image)]
        groups = [{"params": weights, "lr": 0.4, "weight_decay": 1e-2}]
        self.optimizer = optim.LARS(groups, 0.4, 0.9, eta=0.02, clip_lr=True, exclude_bias_n_norm=True)


@pytest.mark.parametrize("subject", [loss, step])
def test_a_folder_without_a_peer_is_one_line(subject, tmp_path):
    with pytest.raises(ConfigError, match="is none of these") as error:
        subject.main(["--peer", str(tmp_path)])
    assert error.value.exit_code == 2


def test_compiled_formulas_take_a_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(EnvironmentFault, match="needs a C") as error:
        loss.main(["--peer", "torch-compile", "--only", "L4"])
    assert error.value.exit_code == 5


@pytest.mark.parametrize("words", [["--only", "L9"], ["--only", "L5", "--peer", "torch-compile"]])
def test_an_unknown_measurement_is_one_line(words):
    with pytest.raises(ConfigError, match="--only takes"):
        loss.main(words)
