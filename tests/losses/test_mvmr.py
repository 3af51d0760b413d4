"""MV-MR's loss against the official code's numbers, and distance correlation against its equation in loops."""

import math

import pytest
import torch

from solo.losses import distance_correlation, mvmr_loss_func
from solo.losses.mvmr import WIDTH, _columns, _distances, _spread
from solo.representations import represent
from tests.losses.test_losses import assert_gradient

# Bounds of the golden files: of the value, of a gradient's largest entry.
EXACT = {torch.float64: (1e-10, 1e-8), torch.float32: (1e-5, 1e-4)}
SINGLE = 1e-6, 1e-5                                                     # the official scattering and HOG are in float32
DTYPES = [torch.float64, torch.float32]


def inputs(z, dtype, *names):
    return [z[name].double().to(dtype).requires_grad_() for name in names]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["small", "medium", "clamped"])
def test_distance_correlation_equals_official(golden, name, dtype):
    g = golden(f"mvmr_dcor_{name}")
    x, z = inputs(g, dtype, "x", "z")
    value = distance_correlation(x, z)
    value.backward()
    rel, gradient = EXACT[dtype]
    assert value.item() == pytest.approx(g["loss"].item(), rel=rel)
    assert_gradient(x.grad, g["grad_x"], gradient)
    assert_gradient(z.grad, g["grad_z"], gradient)
    n, sides = len(x), {"x": _spread(x.detach()), "z": _spread(z.detach())}
    roots = {f"dvar_{name}": side.variance.sqrt() for name, side in sides.items()}
    roots["dcov"] = (sides["x"].centred * sides["z"].centred).mean().sqrt()
    for name, root in roots.items():
        assert root.item() == pytest.approx(g[name].item(), rel=rel)
        assert root.item() / n == pytest.approx(g[f"{name}_over_n"].item(), rel=rel)
    for side, rows in (("x", x), ("z", z)):
        if f"dist_{side}" in g:
            assert_gradient(_distances(rows.detach()), g[f"dist_{side}"], rel)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ["small", "medium"])
def test_distillation_equals_official(golden, size, dtype):
    g = golden(f"mvmr_mi_clip_{size}")
    z, z_original = inputs(g, dtype, "z", "z_orig")
    terms = mvmr_loss_func(z, z_original, {}, g["clip_embedding"].double().to(dtype))
    terms.loss.backward()
    rel, gradient = EXACT[dtype]
    for found, name in (
        (terms.invariance, "mse"),
        (terms.variance, "std"),
        (1 - terms.views, "one_minus_dcor_zz"),
        (1 - terms.teacher, "one_minus_dcor_clip"),
        (terms.loss, "loss"),
    ):
        assert abs(found.item() - g[name].item()) <= rel * g[name].item(), name
    assert_gradient(z.grad, g["grad_z"], gradient)
    assert_gradient(z_original.grad, g["grad_z_orig"], gradient)

    only = [x.detach().requires_grad_() for x in (z, z_original)]
    mvmr_loss_func(*only, {}, views_weight=0.0).loss.backward()
    plain = min(gradient, {torch.float64: 1e-9}.get(dtype, gradient))       # no distance correlation in it
    assert_gradient(only[0].grad, g["grad_z_mi"], plain)
    assert_gradient(only[1].grad, g["grad_z_orig_mi"], plain)
    mi = terms.invariance + terms.variance
    assert mi.item() == pytest.approx(g["mi_loss"].item(), rel=rel)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", ["paper", "released"])
@pytest.mark.parametrize("size", ["small", "medium"])
def test_whole_loss_equals_official(golden, size, sign, dtype):
    g = golden(f"mvmr_full_{size}")
    z, z_original = inputs(g, dtype, "z", "z_orig")
    image, transformed = (g[name].double().to(dtype) for name in ("image", "image_transformed"))
    features = {name: represent(name, image) for name in ("raw", "scattering", "hog", "local_std")}
    features["augmented"] = represent("raw", transformed)               # the official draw is given
    terms = mvmr_loss_func(z, z_original, features, sign=sign)
    terms.loss.backward()
    rel, gradient = SINGLE
    suffix = "_paper_sign" if sign == "paper" else ""
    assert terms.loss.item() == pytest.approx(g[f"loss{suffix}"].item(), rel=rel)
    parts = {"mse": terms.invariance, "std": terms.variance, "one_minus_dcor_zz": 1 - terms.views}
    for name, part in parts.items():
        assert part.item() == pytest.approx(g[name].item(), rel=rel if dtype == torch.float64 else EXACT[dtype][0]), name
    order = ("raw", "scattering", "augmented", "hog", "local_std")
    assert [terms.representations[name].item() for name in order] == pytest.approx(g["dcor_repr"].tolist(), rel=rel)
    assert_gradient(z.grad, g[f"grad_z{suffix}"], gradient)
    assert_gradient(z_original.grad, g[f"grad_z_orig{suffix}"], gradient)


def centred_distances(x):
    """Rows of a list of lists -> distances and doubly centred distances, in loops."""
    n = len(x)
    d = [[math.sqrt(max(sum((a - b) ** 2 for a, b in zip(p, q, strict=True)), 1e-4)) for q in x] for p in x]
    row = [sum(d[i]) / n for i in range(n)]
    column = [sum(d[i][j] for i in range(n)) / n for j in range(n)]
    mean = sum(row) / n
    return d, [[d[i][j] - row[i] - column[j] + mean for j in range(n)] for i in range(n)]


def test_distance_correlation_is_its_equation():
    torch.manual_seed(0)
    x, z = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    z[1] = z[0] + 1e-3                                                  # closer than the bound: no gradient between them
    n, (_, a), (dz, b) = 7, centred_distances(x.tolist()), centred_distances(z.tolist())
    pairs = [(i, j) for i in range(n) for j in range(n)]
    xz, xx, zz = (sum(p[i][j] * q[i][j] for i, j in pairs) / n**2 for p, q in ((a, b), (a, a), (b, b)))
    dcor = math.sqrt(xz / math.sqrt(xx * zz))
    gradient = torch.zeros_like(z)
    for i, j in pairs:
        if dz[i][j] > 0.01:
            g = dcor * (a[i][j] / (2 * xz) - b[i][j] / (2 * zz)) / n**2
            g += dcor * (a[j][i] / (2 * xz) - b[j][i] / (2 * zz)) / n**2
            gradient[i] += g * (z[i] - z[j]) / dz[i][j]
    z.requires_grad_()
    value = distance_correlation(x, z)
    value.backward()
    assert value.item() == pytest.approx(dcor, rel=1e-12)
    assert_gradient(z.grad, gradient, 1e-10 * 2)


def test_distance_correlation_of_known_samples():
    torch.manual_seed(0)
    x = torch.randn(40, 6, dtype=torch.float64)
    assert distance_correlation(x, 3 * x + 1).item() == pytest.approx(1.0, abs=1e-2)     # but for the diagonal of 0.01
    square = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    first, second = (square[:, i : i + 1].clone().requires_grad_() for i in range(2))
    independent = distance_correlation(first, second)
    independent.backward()
    assert independent.item() < 1e-3 and first.grad.isfinite().all() and second.grad.isfinite().all()


def test_blocks_equal_the_whole():
    torch.manual_seed(0)
    x, z = torch.randn(9, 50, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    whole = distance_correlation(x, z).item()
    assert distance_correlation(iter(x.split(7, dim=1)), z).item() == pytest.approx(whole, rel=1e-12)
    wide = torch.randn(9, 40_000, dtype=torch.float64)                  # more columns than are held at once
    parts = distance_correlation(iter(wide.split(1000, dim=1)), z).item()
    assert distance_correlation(wide, z).item() == pytest.approx(parts, rel=1e-12)
    short = x.bfloat16()                                                # a block of 16 bits is widened, not computed with
    assert distance_correlation(iter([short]), z).item() == distance_correlation(short.float(), z).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-4])
def test_collapse_is_finite(scale, dtype):
    torch.manual_seed(0)
    z, z_original = ((1 + scale * torch.randn(8, 5)).to(dtype).requires_grad_() for _ in range(2))
    features = {"some": torch.randn(8, 20), "none": torch.ones(8, 20)}
    terms = mvmr_loss_func(z, z_original, features, torch.ones(8, 4))
    terms.loss.backward()
    values = [terms.loss, terms.views, terms.teacher, *terms.representations.values(), z.grad, z_original.grad]
    assert all(value.isfinite().all() for value in values)
    if scale == 0.0:
        assert terms.views < 0.1 and terms.representations["some"] < 0.1


def test_collapse_of_one_dimension_is_finite():
    z = torch.randn(8, 3)
    z[:, 1] = 2.0
    z.requires_grad_()
    mvmr_loss_func(z, z.detach() + 1, {}).loss.backward()
    assert z.grad.isfinite().all()


def test_saved_for_backward_does_not_grow_with_the_representation():
    torch.manual_seed(0)
    z, z_original = torch.randn(2, 16, 8, requires_grad=True)

    def saved(width):
        count = []

        def pack(x):
            count.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            features = torch.randn(16, width, requires_grad=True)         # a constant all the same
            loss = mvmr_loss_func(z, z_original, {"wide": features, "blocks": iter(features.split(8, 1))}, features).loss
        loss.backward()
        assert features.grad is None
        return sum(count)

    assert saved(64) == saved(4096)


def test_no_block_outlives_the_next():
    import weakref

    alive = []

    def blocks():
        for _ in range(4):
            block = torch.randn(6, 3)
            alive.append(weakref.ref(block))
            assert sum(ref() is not None for ref in alive) <= 2
            yield block

    distance_correlation(blocks(), torch.randn(6, 2))
    assert len(alive) == 4


def test_no_block_is_wider_than_said():
    widths = [block.shape[1] for block in _columns(torch.randn(2, 40_000))]
    assert widths == [16_384, 16_384, 7_232] and WIDTH == 16_384


def test_weights_and_signs():
    torch.manual_seed(0)
    z, z_original, a, b, teacher = torch.randn(5, 6, 4, dtype=torch.float64)
    one = mvmr_loss_func(z, z_original, {"a": a, "b": b}, teacher)
    expected = 2 * one.invariance + 3 * one.variance + 5 * (1 - one.views) + 7 * (1 - one.teacher)
    features = {"a": a, "b": b}
    weights = dict(invariance_weight=2.0, variance_weight=3.0, views_weight=5.0, teacher_weight=7.0,
                   representation_weights={"b": 11.0})
    dcor = one.representations
    paper = mvmr_loss_func(z, z_original, features, teacher, **weights).loss
    assert paper.item() == pytest.approx((expected + (1 - dcor["a"]) + 11 * (1 - dcor["b"])).item(), rel=1e-12)
    released = mvmr_loss_func(z, z_original, features, teacher, sign="released", **weights).loss
    assert released.item() == pytest.approx((expected + dcor["a"] + 11 * dcor["b"]).item(), rel=1e-12)
    with pytest.raises(ValueError, match=r"weights for \['c'\], but the representations are \['a', 'b'\]"):
        mvmr_loss_func(z, z_original, features, representation_weights={"c": 1.0})
    with pytest.raises(ValueError, match="no block"):
        mvmr_loss_func(z, z_original, {"empty": iter(())})


def test_mixed_precision_changes_nothing():
    torch.manual_seed(0)
    z, z_original, feature = torch.randn(3, 12, 40)

    def mixed():
        yield feature @ feature.T                                       # when it is asked for: not under autocast

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mvmr_loss_func(z, z_original, {"a": mixed()}).loss
    assert torch.equal(inside, mvmr_loss_func(z, z_original, {"a": feature @ feature.T}).loss)


def test_gradcheck():
    torch.manual_seed(1)
    x, z = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(distance_correlation, (x, z))
