"""`micro_batch`: images pass the backbone in parts. That a step of each method is that of the whole batch is in the contract
(`solo.testing.invariance.large_batch_mode_equals_one`)."""

import copy

import pytest
import timm.layers
import torch
from torch import nn

from solo.backbones import BackboneConfig, build
from solo.batching import ViewBatching
from solo.bench.memory import peak_bytes
from solo.run import pretrain
from solo.testing.case import Case

SMALL = BackboneConfig(kwargs={"channels": [16, 16, 16, 32], "layers": [1, 1, 1, 1]})


def test_norms_take_each_part_by_itself_and_count_it_once():
    torch.manual_seed(0)
    network, x = build(SMALL, 3, 16).double(), torch.randn(10, 3, 16, 16, dtype=torch.float64)
    parts = copy.deepcopy(network)
    (out,) = ViewBatching(micro_batch=4)(network, [x])
    (out * out).sum().backward()
    expected = torch.cat([parts(part) for part in x.split(4)])
    (expected * expected).sum().backward()
    torch.testing.assert_close(out, expected)
    for (name, ours), theirs in zip(network.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    for (name, ours), theirs in zip(network.named_buffers(), parts.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert network.get_buffer("bn1.num_batches_tracked") == 3


def test_what_is_drawn_at_random_is_the_same_both_times():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), timm.layers.DropPath(0.3), nn.Flatten())
    x, parts = torch.randn(6, 3, 8, 8), copy.deepcopy(network)
    for each, run in ((network, lambda: ViewBatching(micro_batch=2)(network, [x])[0]),
                      (parts, lambda: torch.cat([parts(part) for part in x.split(2)]))):
        torch.manual_seed(3)
        (run() ** 2).sum().backward()
        assert each[0].weight.grad is not None
    assert torch.equal(network[0].weight.grad, parts[0].weight.grad)


@pytest.mark.slow
def test_memory_for_activations_is_that_of_a_part():
    network = build(SMALL, 3, 16)

    def peak(images, micro_batch):
        views = [torch.randn(images, 3, 16, 16)]
        network.zero_grad()
        return peak_bytes(lambda: ViewBatching(micro_batch=micro_batch)(network, views)[0].square().sum().backward())

    peak(8, None)                                                   # gradients are there from now on
    whole, parts, twice = peak(64, None), peak(64, 8), peak(128, 8)
    assert parts < 0.25 * whole and twice < 1.1 * parts, (whole, parts, twice)


@pytest.mark.parametrize("autocast", [False, True])
def test_heads_and_smaller_batches_pass_whole(autocast):
    seen = []
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    network.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = ViewBatching(micro_batch=4)(network, [torch.randn(8, 12), torch.randn(3, 3, 2, 2), torch.randn(8, 3, 2, 2)])
        sum(out.float().sum() for out in outputs).backward()
    assert seen == [8, 3, 4, 4] and [len(out) for out in outputs] == [8, 3, 8]


@pytest.mark.slow
def test_a_run_says_what_its_norms_do(tmp_path, caplog):
    caplog.set_level("INFO", "solo")
    result = pretrain(Case("simclr").experiment(tmp_path, micro_batch=2, max_epochs=1))
    assert "micro_batch=2: the backbone's norms take their statistics from 2 images at a time" in caplog.text
    assert result.method.each.used and result.method.backbone.get_buffer("bn1.num_batches_tracked") == 8 * 2 * 4


def test_no_line_where_there_is_nothing_to_say():
    assert ViewBatching(micro_batch=2).note(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))) == ""
    assert ViewBatching().note(build(SMALL, 3, 16)) == ""
