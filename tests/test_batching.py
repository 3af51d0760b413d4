"""`view_batching: concat` changes how views are run and nothing of what comes out."""

import copy
import gc
import pickle
import weakref
from functools import partial

import pytest
import timm.layers
import torch
from torch import nn

from solo.backbones import BackboneConfig, build
from solo.batching import PerView, ViewBatching
from solo.dist import rank
from solo.errors import ConfigError
from solo.experiment import experiment
from solo.methods import METHODS
from solo.nn import mlp
from solo.testing.case import Case, tiny
from solo.testing.ranks import run_ranks


class Odd(nn.Sequential):
    """Norms by batch statistics of every kind, and one of each image."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.Conv2d(8, 8, 1), timm.layers.BatchNormAct2d(8),
            nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 8, 1), timm.layers.EvoNorm2dB0(8),
            nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, track_running_stats=False), nn.GroupNorm(2, 8), nn.Flatten(),
            nn.LazyLinear(6), nn.BatchNorm1d(6),
        )


NETWORKS = {
    "resnet": lambda: build(BackboneConfig(kwargs={"channels": [16, 16, 16, 32], "layers": [1, 1, 1, 1]}), 3, 16),
    "odd": Odd,
    "frozen": lambda: NETWORKS["resnet"]().requires_grad_(False),
    "eval": lambda: NETWORKS["resnet"]().eval(),
}


def after(network, mode, views):
    """Outputs, gradients of parameters and views, and buffers."""
    network, views = copy.deepcopy(network), [view.clone().requires_grad_() for view in views]
    outputs = ViewBatching(mode)(network, views)
    weights = [torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out) for out in outputs]
    sum((out * out * w).sum() for out, w in zip(outputs, weights, strict=True)).backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    return outputs, [view.grad for view in views], gradients, dict(network.named_buffers())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("sizes", [(16, 16), (16, 16, 12, 12, 12), (16,)], ids=str)
def test_concat_equals_separate(name, sizes):
    torch.manual_seed(0)
    if name == "odd":
        sizes = (16,) * len(sizes)                                  # it ends in a Linear over all pixels
    views = [3 * i + torch.randn(5, 3, size, size, dtype=torch.float64) for i, size in enumerate(sizes)]
    network = NETWORKS[name]().double()
    network.eval()(views[0]), network.train(name != "eval")
    torch.testing.assert_close(after(network, "concat", views), after(network, "separate", views), rtol=1e-9, atol=1e-9)


def test_heads_too():
    torch.manual_seed(0)
    head, views = mlp(6, 8, 4, last_norm=True, last_affine=False).double(), [torch.randn(5, 6).double() for _ in range(3)]
    torch.testing.assert_close(after(head, "concat", views), after(head, "separate", views), rtol=1e-10, atol=1e-10)


def test_bfloat16():
    torch.manual_seed(0)
    head, views = mlp(6, 8, 4, last_norm=True), [torch.randn(5, 6) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        concat, separate = after(head, "concat", views), after(head, "separate", views)
    torch.testing.assert_close(concat, separate, rtol=1e-2, atol=1e-2)


def test_one_pass_per_size():
    network, passes = NETWORKS["resnet"](), []
    network.register_forward_hook(lambda module, args, out: passes.append(args[0].shape[-1]))
    ViewBatching("concat")(network, [torch.randn(4, 3, size, size) for size in (16, 16, 12, 12, 12)])
    assert passes == [16, 12]


def test_a_network_run_by_itself_sees_one_view():
    network, x = NETWORKS["resnet"](), torch.randn(6, 3, 16, 16)
    plain = copy.deepcopy(network)
    ViewBatching("concat")(network, [x, x]), [plain(x) for _ in range(2)]
    assert torch.equal(network(x), plain(x)) and list(network.state_dict()) == list(plain.state_dict())


def test_a_norm_may_be_part_of_several_networks():
    """Of one method, or of two that share a backbone; each view keeps its own statistics."""
    torch.manual_seed(0)
    inner, views = mlp(6, 8, 8).double(), [torch.randn(5, 6).double(), 3 * torch.randn(5, 6).double() + 1]
    outer, plain = nn.Sequential(mlp(6, 8, 6).double(), inner), copy.deepcopy(inner)
    first, second = ViewBatching("concat"), ViewBatching("concat")
    for each, network in ((first, inner), (first, outer), (second, outer), (first, inner)):
        found = each(network, views)
    torch.testing.assert_close(found, [plain(view) for view in views], rtol=1e-9, atol=1e-9)


def test_networks_made_anew_are_let_go():
    each, head = ViewBatching("concat"), mlp(6, 8, 4)
    made = []
    for _ in range(3):
        network = nn.Sequential(head)
        each(network, [torch.randn(5, 6) for _ in range(2)])
        made.append(weakref.ref(network))
    del network
    gc.collect()
    assert [seen() for seen in made] == [None] * 3 and each.used


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))], ids=["copied", "pickled"])
def test_a_copy_runs_like_the_first(copied):
    torch.manual_seed(0)
    batching, head, views = ViewBatching("concat"), mlp(6, 8, 4), [torch.randn(5, 6), 3 * torch.randn(5, 6) + 1]
    batching(head, views)
    other_batching, other = copied((batching, head))
    assert type(other[1]) is type(head[1]) and other_batching.mode == "concat" and other_batching.used
    torch.testing.assert_close(other_batching(other, views), batching(head, views), rtol=0, atol=0)
    torch.testing.assert_close(dict(other.named_buffers()), dict(head.named_buffers()), rtol=0, atol=0)


def test_norms_that_were_replaced_are_found_anew():
    """Lightning puts SyncBatchNorm in when a run begins."""
    network, batching = mlp(6, 8, 4), ViewBatching("concat")
    views = [torch.randn(5, 6) for _ in range(2)]
    batching(network, views)
    network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    batching.renew()
    kept = copy.deepcopy(network).eval()
    torch.testing.assert_close(batching(network.eval(), views), [kept(view) for view in views])
    assert isinstance(network[1], PerView) and isinstance(network[1], nn.SyncBatchNorm)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_methods_lose_nothing(method):
    """Loss, gradients and everything a step leaves in the state; in float64, so that only the order of sums differs."""
    found = {}
    for mode in ("separate", "concat"):
        model = Case(method, view_batching=mode).build().double()
        batch = Case(method).batches(1)[0]
        batch = batch._replace(views=[view.double() for view in batch.views])
        torch.manual_seed(0)
        outputs = model.losses(batch)
        outputs["loss"].backward()
        model.after_step(0.5)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found[mode] = outputs["loss"].detach(), outputs["feats"].detach(), gradients, model.state_dict()
        norms = [module for module in model.modules() if isinstance(module, PerView)]
        assert bool(norms) == (mode == "concat")
    torch.testing.assert_close(found["concat"], found["separate"], rtol=1e-10, atol=1e-12)


def test_a_method_that_runs_its_networks_itself_is_refused():
    model = Case("simclr", view_batching="concat").build()
    model.losses = lambda batch: {"loss": model.backbone(batch.views[0]).sum(), "feats": model.backbone(batch.views[0])}
    with pytest.raises(ConfigError, match="view_batching=concat has no effect: SimCLR runs its networks without self.each"):
        model.training_step(Case("simclr").batches(1)[0], 0)


@pytest.mark.parametrize("whole", [False, True], ids=["alone", "within a network made anew"])
def test_micro_batch_is_refused_where_only_heads_run_in_parts(whole):
    model = Case("simclr", micro_batch=2).build()
    assert model.training_step(Case("simclr").batches(1)[0], 0)["loss"] > 0

    def heads_only(batch):
        if whole:
            (z,) = model.each(torch.nn.Sequential(model.backbone, model.projector), batch.views[:1])
        else:
            (z,) = model.each(model.projector, [model.backbone(batch.views[0])])
        return {"loss": z.sum(), "feats": z}

    model.losses = heads_only
    model.each.renew()
    if whole:
        model.training_step(Case("simclr").batches(1)[0], 0)
    else:
        with pytest.raises(ConfigError, match="micro_batch has no effect: SimCLR runs its backbone without self.each"):
            model.training_step(Case("simclr").batches(1)[0], 0)


def test_the_directory_is_the_same(tmp_path):
    folders = {experiment(tiny("nnclr", tmp_path, view_batching=mode)).run_dir(8) for mode in ("separate", "concat")}
    assert len(folders) == 1


# --- layout --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["separate", "concat"])
def test_every_map_keeps_the_fast_layout(mode):
    """From the batch, which comes as the loader made it, to the last map, forwards and backwards."""
    network, wrong, maps = NETWORKS["resnet"](), [], []

    def look(name, tensor):
        if tensor is not None and tensor.ndim == 4 and min(tensor.shape[1:]) > 1:
            maps.append(name)
            if not tensor.is_contiguous(memory_format=torch.channels_last):
                wrong.append((name, tensor.shape, tensor.stride()))

    def hook(module, args, out, name):
        look(f"into {name}", args[0]), look(name, out)
        if isinstance(module, torch.nn.Conv2d):
            out.register_hook(lambda gradient: look(f"gradient of {name}", gradient))

    for name, module in network.named_modules():
        module.register_forward_hook(partial(hook, name=name))
    views = [torch.randn(4, 3, 16, 16) for _ in range(2)]
    feats = ViewBatching(mode)(network, views)
    sum(f.square().sum() for f in feats).backward()
    assert not wrong and len(maps) > 50
    kernels = [p for p in network.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


# --- ranks ---------------------------------------------------------------------------------------------------------------


def _two(_, mode):
    torch.manual_seed(0)
    model = Case("nnclr", view_batching=mode).build().double()
    batch = Case("nnclr").batches(1)[0]
    views = [view.double()[rank() * 4 : rank() * 4 + 4] for view in batch.views]
    part = batch._replace(views=views, labels=batch.labels[rank() * 4 : rank() * 4 + 4])
    loss = model.losses(part)["loss"]
    loss.backward()
    return loss.item(), model.backbone.conv1.weight.grad.numpy()


def test_on_two_ranks():
    for (loss, gradient), (other, same) in zip(run_ranks(_two, "concat"), run_ranks(_two, "separate"), strict=True):
        assert loss == pytest.approx(other, rel=1e-9)
        torch.testing.assert_close(torch.as_tensor(gradient), torch.as_tensor(same), rtol=1e-6, atol=1e-9)
