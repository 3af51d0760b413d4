"""Non-finite values stop a run in time; collapse and chance are told once."""

import math

import pytest
import torch

from solo.callbacks.health import Health, HealthConfig
from solo.callbacks.signs import effective_rank, feature_std
from solo.errors import NumericsError
from tests.callbacks.toy import Toy, fit


def parameters(module):
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_non_finite_loss_stops_before_the_update(accumulate):
    clean, _ = fit([], max_steps=4, accumulate_grad_batches=accumulate)
    module = Toy(poison_at=4)
    said = r"non-finite loss of Toy at step 5 \(epoch \d, lr 0\.05; not finite: backbone\..*weights are those of step 4;"
    with pytest.raises(NumericsError, match=said) as caught:
        fit([Health()], module, max_epochs=10, accumulate_grad_batches=accumulate)
    assert caught.value.exit_code == 4
    for a, b in zip(parameters(clean), parameters(module), strict=True):
        assert torch.equal(a, b)


def test_non_finite_gradient_with_finite_loss_stops():
    class Spike(Toy):
        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            outputs["loss"] = outputs["loss"] + 0 * self.backbone[1].weight.sum().mul(0).sqrt()
            return outputs

    module = Spike()
    before = parameters(module)
    said = r"non-finite gradient of Spike at step 1 .* not finite: backbone\.1\.weight\.grad\)"
    with pytest.raises(NumericsError, match=said):
        fit([Health()], module)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(module), strict=True))


def test_the_norm_of_a_finite_gradient_that_overflows_is_named():
    class Steep(Toy):
        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            weight = self.backbone[1].weight
            return {**outputs, "loss": outputs["loss"] + 1e20 * (weight - weight.detach()).sum()}

    with pytest.raises(NumericsError, match=r"non-finite gradient .*; not finite: the norm of the gradient alone\)"):
        fit([Health()], Steep())


def told(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "solo.callbacks.health"]


def test_healthy_run_measures_and_warns_of_nothing(caplog):
    health = Health(HealthConfig(every=2, patience=1))
    fit([health])
    assert not told(caplog)
    assert set(health.step_scalars) == {"feature_std", "effective_rank"}


class Collapsed(Toy):
    def training_step(self, batch, batch_idx):
        outputs = super().training_step(batch, batch_idx)
        return {**outputs, "feats": torch.ones_like(outputs["feats"])}


def test_collapse_is_told_once(caplog):
    fit([Health(HealthConfig(every=1, patience=3))], Collapsed())
    assert len(told(caplog)) == 2
    assert "has collapsed" in caplog.text and "directions only" in caplog.text


def test_loss_at_chance_is_told(caplog):
    class Chance(Toy):
        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            return {**outputs, "nnclr_loss": torch.tensor(math.log(len(batch.labels)))}

    fit([Health(HealthConfig(every=1, patience=4))], Chance())
    assert len(told(caplog)) == 1 and "nnclr_loss stays at ln 8 = 2.08, which is chance" in caplog.text


def test_measures():
    generator = torch.Generator().manual_seed(0)
    sphere = torch.randn(512, 32, generator=generator)
    assert feature_std(sphere) == pytest.approx(1, abs=0.05) and effective_rank(sphere) > 30
    point = torch.ones(64, 32)
    assert feature_std(point) < 1e-3
    line = torch.randn(64, 1, generator=generator) * torch.ones(1, 32) + torch.eye(32)[0]
    assert effective_rank(line) < 2.5


def test_config_refuses_all_at_once():
    with pytest.raises(ValueError, match=r"every .*\n.*patience"):
        HealthConfig(every=0, patience=0)
