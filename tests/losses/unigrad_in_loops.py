"""The gradients of UniGrad's family with the paper's formulas, on lists of floats, with the published constants."""

import math

import torch


def unit(row):
    return [x / math.sqrt(sum(y * y for y in row)) for x in row]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def times(row, matrix):
    return [sum(row[i] * matrix[i][j] for i in range(len(row))) for j in range(len(matrix[0]))]


def contrast(z, own, others, temperature):
    """Both parts of one row against its own target and others, one of which may be the own one."""
    logits = [dot(z, v) / temperature for v in others]
    total = sum(math.exp(logit) for logit in logits)
    negative = [sum(math.exp(logit) / total * v[d] for logit, v in zip(logits, others, strict=True)) for d in range(len(z))]
    return [-x / temperature for x in own], [x / temperature for x in negative]


def predictor(F, eps):
    """W and A of DirectPred, W by the eigenvectors of F."""
    values, vectors = (x.tolist() for x in torch.linalg.eigh(torch.tensor(F, dtype=torch.float64)))
    top, d = max(values), range(len(F))
    lengths = [max(math.sqrt(max(v, 0) / top) + eps, 1e-4) for v in values]
    W = [[sum(vectors[i][k] * lengths[k] * vectors[j][k] for k in d) for j in d] for i in d]
    A = [[F[i][j] / top + (eps**2 if i == j else 0) for j in d] for i in d]
    return W, A


def direct(z, m, W, A):
    zW, zA, mW = times(z, W), times(z, A), times(m, W)
    length, c = math.sqrt(dot(zW, zW)), dot(zW, m) / dot(zA, z)
    return [-x / length for x in mW], [c * x / length for x in zA]


def vicreg(z, m):
    """Both parts of each row of a view, neither normalised."""
    n, d = len(z), len(z[0])
    mean = [sum(row[k] for row in z) / n for k in range(d)]
    x = [[row[k] - mean[k] for k in range(d)] for row in z]
    cov = [[sum(row[a] * row[b] for row in x) / (n - 1) for b in range(d)] for a in range(d)]
    std = [math.sqrt(cov[k][k] + 1e-4) for k in range(d)]
    assert 0 < sum(s < 1 for s in std) < d                          # the hinge is at work in some dimensions
    parts = []
    for i in range(n):
        push = [-x[i][k] / ((n - 1) * std[k]) / d if std[k] < 1 else 0.0 for k in range(d)]
        spread = [sum(4 * cov[k][j] * x[i][j] for j in range(d) if j != k) / ((n - 1) * d) for k in range(d)]
        positive = [2 * 25 * 2 * (z[i][k] - m[i][k]) / d for k in range(d)]
        parts.append((positive, [2 * n * (25 * p + s) for p, s in zip(push, spread, strict=True)]))
    return parts


def by_loops(name, z1, z2, m1, m2, queue=None, seen=None):
    """(positive, negative) rows of view 1 and of view 2, with the paper's formulas on lists of floats.

    ``name`` is the form's; ``seen`` are the normalised targets that F is the mean of, if not those of this batch.
    """
    if name == "vicreg":
        return [*vicreg(z1.tolist(), m2.tolist()), *vicreg(z2.tolist(), m1.tolist())]
    z = [[unit(row) for row in view.tolist()] for view in (z1, z2)]
    m = [[unit(row) for row in view.tolist()] for view in (m1, m2)]
    everything, n, d = [*m[0], *m[1]], len(z[0]), len(z[0][0])
    F = [[sum(t[a] * t[b] for t in seen or everything) / len(seen or everything) for b in range(d)] for a in range(d)]
    W, A = predictor(F, 0.3)
    parts = []
    for view, other in ((0, 1), (1, 0)):
        for i in range(n):
            row, target = z[view][i], m[other][i]
            if name == "unigrad":
                parts.append(([-x for x in target], [100 * x for x in times(row, F)]))
            elif name == "simclr":
                parts.append(contrast(row, target, everything, 0.2))
            elif name == "moco":
                parts.append(contrast(row, target, [target, *queue.tolist()], 0.2))
            elif name in ("simsiam", "byol_directpred"):
                parts.append(direct(row, target, W, A))
            elif name == "barlow":
                weights = [dot(target, m[other][j]) / n for j in range(n)]
                negative = [2 * 50 * sum(w * z[view][j][k] for j, w in enumerate(weights)) for k in range(d)]
                parts.append(([-2 * x for x in target], negative))
    return parts
