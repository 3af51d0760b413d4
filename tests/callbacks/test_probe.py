"""The probe learns, resumes bit for bit, and leaves the backbone alone."""

import math

import pytest
import torch

from solo.callbacks.metrics import StepScalars
from solo.callbacks.probe import OnlineProbe, ProbeConfig
from tests.callbacks.toy import CLASSES, Toy, fit


def probe(lr: float = 0.5) -> OnlineProbe:
    return OnlineProbe(dim=6, num_classes=CLASSES, lr=lr)


def test_backbone_is_bit_identical_with_or_without():
    without, _ = fit([])
    with_probe, trainer = fit([probe()])
    for a, b in zip(without.state_dict().values(), with_probe.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert trainer.callback_metrics["val/probe_acc1"] > 80
    assert trainer.callback_metrics["val/probe_acc5"] == 100  # three classes: five guesses are three


def test_construction_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first, second = probe(), probe()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.head.weight, second.head.weight)


def test_state_is_tensors_and_resumes_bit_exact():
    generator = torch.Generator().manual_seed(0)
    steps = [(torch.randn(8, 6, generator=generator), torch.randint(-1, CLASSES, (8,), generator=generator)) for _ in range(6)]
    whole = probe()
    for feats, labels in steps:
        whole.update(feats, labels, 0.1)
    first, second = probe(), probe()
    for feats, labels in steps[:3]:
        first.update(feats, labels, 0.1)
    state = first.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    second.load_state_dict(state)
    for feats, labels in steps[3:]:
        second.update(feats, labels, 0.1)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_update_is_sgd_on_the_labelled_rows():
    p, feats, labels = probe(), torch.randn(8, 6), torch.tensor([0, 1, 2, -1, -1, 0, 1, 2])
    reference = torch.nn.Linear(6, CLASSES)
    reference.load_state_dict(p.head.state_dict())
    loss = torch.nn.functional.cross_entropy(reference(feats), labels, ignore_index=-1)
    loss.backward()
    expected = reference.weight - 0.3 * reference.weight.grad
    scalars = p.update(feats, labels, 0.3)
    torch.testing.assert_close(p.head.weight, expected)
    torch.testing.assert_close(scalars["probe_loss"], loss.detach())


def test_a_batch_without_labels_changes_nothing():
    p = probe()
    before = p.state_dict()
    scalars = p.update(torch.randn(4, 6), torch.full((4,), -1), 0.3)
    assert scalars["probe_loss"].isnan() and scalars["probe_acc1"].isnan()
    assert all(torch.equal(before[name], value) for name, value in p.state_dict().items())


def test_rate_is_half_a_cosine_over_the_run():
    class Watched(OnlineProbe):
        def update(self, feats, labels, lr):
            rates.append(lr)
            return super().update(feats, labels, lr)

    rates = []
    fit([Watched(dim=6, num_classes=CLASSES, lr=0.5)], max_epochs=2)
    assert rates == pytest.approx([0.25 * (1 + math.cos(math.pi * t / 12)) for t in range(12)])


def test_images_without_a_label_are_neither_right_nor_counted():
    """A head that is always right has 100 % of the labelled images, in training and in validation."""

    class Knowing(Toy):
        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            return {**outputs, "feats": torch.eye(6)[batch.labels.clamp(min=0)]}

        def validation_step(self, batch, batch_idx):
            return {"feats": torch.eye(6)[batch.labels.clamp(min=0)], "labels": batch.labels}

    p = probe(lr=1e-9)
    with torch.no_grad():
        p.head.weight.copy_(torch.eye(6)[:CLASSES])
        p.head.bias.zero_()
    _, trainer = fit([p], Knowing(), max_epochs=1)
    assert trainer.callback_metrics["val/probe_acc1"] == 100 and p.step_scalars["probe_acc1"] == 100


def test_half_precision_features_are_read_as_float32():
    class Half(Toy):
        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            return {**outputs, "feats": outputs["feats"].bfloat16()}

    p = probe()
    fit([p], Half(), max_epochs=1)
    assert p.head.weight.dtype == torch.float32 and isinstance(p, StepScalars)


def test_config_refuses():
    with pytest.raises(ValueError, match="momentum"):
        ProbeConfig(momentum=1.5)
