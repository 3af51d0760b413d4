"""UniGrad's CutMix: the box, the gradient of every form and of both views, the contract."""

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from solo.batch import Batch
from solo.losses import unigrad as family
from solo.methods import unigrad as module
from solo.methods.unigrad import CONSTANTS, cutmix
from tests.losses.test_losses import assert_gradient
from tests.losses.unigrad_in_loops import by_loops
from tests.methods.test_golden import Targets
from tests.methods.test_unigrad import CHECK, case, heads_only


def test_cutmix_pastes_a_box_of_the_other_image():
    # The pixels of image i are i, so that a pixel says where it comes from.
    views = [torch.arange(6.0)[:, None, None, None].expand(6, 3, 8, 12).clone(), torch.full((6, 3, 8, 12), -1.0)]
    shares = []
    for seed in range(200):
        torch.manual_seed(seed)
        (mixed, blank), other, share = cutmix(views, 1.0)
        own = (mixed == torch.arange(6.0)[:, None, None, None])
        foreign = mixed == other[:, None, None, None]
        assert (own | foreign).all() and torch.equal(blank, views[1])
        moved = other != torch.arange(6)
        assert moved.any() and (own[moved].float().mean((1, 2, 3)) - share).abs().max() < 1e-6
        assert 0.5 <= share <= 1
        shares.append(share)
    assert 0.6 < sum(shares) / 200 < 0.9 and min(shares) < 0.55 and max(shares) > 0.95
    same, _, share = cutmix(views, 0.0)
    assert same is views and share == 1


@pytest.mark.parametrize("form", CONSTANTS)
def test_cutmix_mixes_the_gradients_by_area(form):
    """Of both views, and of both parts: a g(z, m) + (1 - a) g(z, m of the pasted image), in loops."""
    torch.manual_seed(1)
    images = torch.randn(2, 7, 1, 2, 3, dtype=torch.float64)
    model = heads_only(6, torch.float64, form=form, cutmix=1.0, **({"queue_size": 28} if form == "moco" else {}))
    model.backbone = nn.Flatten()
    targets = torch.randn(2, 7, 6, dtype=torch.float64)
    views = [image.requires_grad_() for image in images]
    model.teacher = Targets(views, targets)
    queue = model.queue.keys.clone() if form == "moco" else None
    torch.manual_seed(4)
    mixed, other, share = cutmix(views, 1.0)
    torch.manual_seed(4)
    outputs = model.losses(Batch(views, torch.zeros(7, dtype=torch.long), torch.arange(7)))
    assert 0.5 < share < 0.95 and (other != torch.arange(7)).any()
    z = [view.flatten(1) for view in mixed]
    parts = []
    for rows, weight in ((torch.arange(7), share), (other, 1 - share)):
        loops = by_loops(form, *(x.detach() for x in z), *targets[:, rows], queue)
        parts.append(weight * torch.tensor(loops, dtype=torch.float64).transpose(0, 1))        # [2, 14, 6]
    positive, negative = sum(parts)
    at = z if form == "vicreg" else [normalize(x, dim=1) for x in z]
    wanted = torch.autograd.grad(((positive + negative) * torch.cat(at)).sum() / 14, views, retain_graph=True)
    for found, expected in zip(torch.autograd.grad(outputs["loss"], views), wanted, strict=True):
        assert_gradient(found, expected, 1e-12)
    for name, part in (("positive_norm", positive), ("negative_norm", negative)):
        assert outputs[name].item() == pytest.approx(part.norm(dim=1).mean().item(), rel=1e-12)
    z, m = ([normalize(x.detach(), dim=1) for x in rows] for rows in (z, targets))
    cosines = [(a * (share * b + (1 - share) * b[other])).sum(1).mean().item() for a, b in zip(z, m[::-1], strict=True)]
    assert outputs["pos_sim"].item() == pytest.approx(sum(cosines) / 2, rel=1e-12)


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("check", ["trains", "resumes_exactly", "teachers_and_queues_advance_once_per_step"])
def test_contract_with_cutmix(check):
    CHECK[check](case("unigrad", cutmix=1.0))


@pytest.fixture
def neighbours(monkeypatch):
    """CutMix whose draws do not depend on how a step is split: one box, pasted from the image beside."""

    def beside(count, **_):
        torch.manual_seed(4)                                    # for the box, which is drawn next
        return torch.arange(count) ^ 1

    monkeypatch.setattr(torch, "randperm", beside)


@pytest.mark.slow
@pytest.mark.parametrize("form", CONSTANTS)
@pytest.mark.parametrize("check", ["micro_batches_equal_one", "ranks_equal_one", "ranks_accumulate", "bfloat16_is_close"])
def test_cutmix_keeps_the_contract_in_every_form(form, check, neighbours):
    CHECK[check](case(form, cutmix=1.0))


@pytest.mark.parametrize("form", CONSTANTS)
def test_cutmix_gathers_as_often_whatever_the_box(form, monkeypatch):
    """Every process draws its own: one that waited for a gather the others leave out would wait for ever."""
    batch, counts = case(form).batches(1)[0], set()
    for share in (1.0, 0.6):
        asked = []
        for name in ("gather", "all_reduce"):
            real = getattr(family, name)
            monkeypatch.setattr(family, name, lambda x, real=real, asked=asked: asked.append(x.shape) or real(x))
        monkeypatch.setattr(module, "cutmix", lambda views, alpha, share=share: (views, torch.arange(8).flip(0), share))
        case(form, cutmix=1.0).build().losses(batch)
        counts.add(tuple(asked))
        monkeypatch.undo()
    assert len(counts) == 1 and (form == "moco" or counts != {()})
