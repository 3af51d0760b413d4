import pytest
import torch

from solo.callbacks import health, knn, probe
from solo.eval.linear import Classifier, LinearConfig
from solo.kernels import nearest, neighbours
from solo.losses import feature_loss_func, nnclr_loss_func, sce_loss_func
from solo.methods import all4one
from solo.nn import Queue, unit
from solo.precision import full_precision
from solo.testing import Case
from tests.callbacks.toy import CLASSES, ToyBackbone, fit


@full_precision
def product(pair, *, scale):
    assert not torch.is_autocast_enabled("cpu")
    return pair[0] @ pair[1] * scale


@pytest.mark.parametrize("given, inside", [
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
])
def test_sixteen_bits_are_widened_and_autocast_is_off(given, inside):
    a = torch.randn(3, 3, dtype=given, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = product((a, a), scale=torch.ones((), dtype=given))
        assert torch.is_autocast_enabled("cpu")
    assert result.dtype == inside
    result.sum().backward()
    assert a.grad.dtype == given


@pytest.mark.parametrize("loss", [
    lambda a, b: nnclr_loss_func(a, b, 0.1),
    lambda a, b: feature_loss_func((a, b), (b, a)),
    lambda a, b: Queue(4096, 64).nearest(a)[0],
    lambda a, b: sce_loss_func(a, b, Queue(4096, 64).keys, in_batch=True, mask_self=True),
], ids=["nnclr", "feature", "nearest", "sce"])
def test_losses_and_searches_are_the_same_bits_under_autocast(loss):
    torch.manual_seed(0)
    a, b = torch.randn(2, 32, 64)
    torch.manual_seed(1)
    expected = loss(a, b)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(a, b)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("size", [4096, 16384], ids=["below LARGE", "above LARGE"])
@pytest.mark.parametrize("form", ["groups", "bfloat16 scan", "plain"])
def test_every_form_of_the_search_is_the_same_under_autocast(form, size, monkeypatch):
    """With 512 rows bfloat16 would confuse some neighbour; `Queue.nearest` looks at keys that no autocast has touched."""
    if form == "plain":
        monkeypatch.setattr(nearest, "_searched", lambda rows, queue, k, shadow: nearest._plain(rows, queue, k))
    else:
        monkeypatch.setattr(nearest, "_bfloat16_is_fast", lambda queue: form == "bfloat16 scan")
        monkeypatch.setattr(nearest, "_pays", lambda *_: True)
    torch.manual_seed(0)
    queue, z = Queue(size, 64), torch.randn(512, 64)
    rows = unit(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, k5 = queue.nearest(z, 5)[0], neighbours(rows, queue.keys, 5)
        rough = (rows @ queue.keys.T).float().topk(5).indices
    exact = (rows.double() @ queue.keys.double().T).topk(5).indices
    assert torch.equal(k5, exact) and torch.equal(found, queue.keys[exact])
    assert (rough != exact).any(), "bfloat16 would have done: this shows nothing"


SIXTEEN = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@SIXTEEN
def test_unit_rows_are_unit_to_float32_under_autocast(dtype):
    z = torch.randn(16, 64).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        rows = unit(z)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, torch.nn.functional.normalize(z.float(), dim=-1), rtol=0, atol=0)


@SIXTEEN
def test_all4one_hands_unit_targets_and_float32_neighbours_to_its_loss(dtype, monkeypatch):
    given = []
    monkeypatch.setattr(all4one, "all4one_loss_func", lambda *a, **k: given.append(a) or real(*a, **k))
    case = Case("all4one")
    model, (batch,) = case.build(), case.batches(1)
    with torch.autocast("cpu", dtype=dtype):
        loss = model.losses(batch)["loss"]
    ((centroids, shifted, neighbours, _, _, targets),) = given
    for rows in (*neighbours, *targets):
        assert rows.dtype == torch.float32 and (rows.double().norm(dim=-1) - 1).abs().max() < 1e-6
    assert all(x.dtype == torch.float32 for x in (*centroids, *shifted, loss))


real = all4one.all4one_loss_func


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_what_watches_works_in_float32(precision, monkeypatch):
    seen = []

    def watched(owner, name):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            features = args[1] if name == "update" else args[0]
            seen.append((name, getattr(features, "features", features).dtype, torch.is_autocast_enabled("cpu")))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    watched(probe.OnlineProbe, "update")
    watched(health, "feature_std")
    watched(health, "effective_rank")
    watched(knn, "knn_hits")
    callbacks = [probe.OnlineProbe(6, CLASSES, 0.1), health.Health(health.HealthConfig(every=1)), knn.KNNCallback(CLASSES)]
    fit(callbacks, max_epochs=1, precision=precision)
    assert {name for name, *_ in seen} == {"update", "feature_std", "effective_rank", "knn_hits"}
    assert {(dtype, autocast) for _, dtype, autocast in seen} == {(torch.float32, False)}


@SIXTEEN
def test_linear_evaluation_ranks_classes_in_float32(dtype):
    model = Classifier(ToyBackbone(), 100, LinearConfig(checkpoint="-"))
    feats = torch.randn(32, 6).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        logits = model.logits(feats)
    expected = feats.double() @ model.head.weight.double().T + model.head.bias.double()
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
