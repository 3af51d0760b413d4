"""What a run shows that learns nothing: measures, and what each says in plain words."""

import math
from collections.abc import Sequence
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solo.nn import Queue, Teacher

WORDS = {
    "collapse": "the features of all images are nearly the same (std {value:.2g} of what evenly spread features have): the "
                "method has collapsed. Likely causes: optimizer.lr too high, a predictor or BatchNorm left out, momentum 1",
    "rank": "the features vary in about {value:.1f} directions only: dimensional collapse. Likely causes: optimizer.lr or "
            "weight_decay too high, augmentations too strong, a loss term with weight 0",
    "plateau": "{name} stays at ln {k} = {value:.2f}, which is chance: nothing is learned. Likely causes: optimizer.lr too low "
               "or too high, a temperature too high, both views unrelated, a projector that gives every image the same, the "
               "backbone frozen",
    "copy": "the teacher is its student: it teaches nothing. Likely causes: momentum.base_tau 0, or no weight moves",
    "far": "the teacher's weights are {value:.2g} times the length of the student's away from them. Likely causes: "
           "momentum.base_tau too near 1, optimizer.lr too high",
    "still teacher": "the teacher stands still. Likely cause: momentum.base_tau 1",
    "still backbone": "no weight of the backbone moves. Likely causes: it is frozen or detached from the loss, optimizer.lr 0",
    "own": "{value:.0%} of the neighbours are the very images that asked for them. Likely causes: the method fills its queue "
           "before it searches, the dataset holds the same images many times",
    "spike": "the loss jumped to {value:.3g} at step {step}, {factor:.1f} times the median {middle:.3g} before it; the last "
             "checkpoint stays. Likely causes: optimizer.lr too high, a batch of damaged images",
}


def feature_std(feats: Tensor) -> Tensor:
    """Spread of L2-normalised rows: mean per-dimension std times sqrt(D), so 1 on the whole sphere and 0 at one point.

    Args:
        feats: [N, D].
    """
    return F.normalize(feats, dim=-1).std(dim=0, correction=0).mean() * math.sqrt(feats.shape[1])


def effective_rank(feats: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of centred L2-normalised rows (Roy and Vetterli 2007).

    Args:
        feats: [N, D]; the first 1024 rows are used.

    Returns:
        Between 1 and min(N, D).
    """
    rows = F.normalize(feats[:1024], dim=-1)
    values = torch.linalg.svdvals(rows - rows.mean(0))
    return torch.special.entr(values / values.sum().clamp(min=1e-12)).sum().exp()


def own_neighbours(z: Tensor, neighbours: Tensor) -> Tensor:
    """Share of rows whose neighbour is they themselves, to within rounding, and unlike the next row's neighbour.

    Where all rows are one point, that is collapse, and nobody has found himself.

    Args:
        z: [B, D], of length 1.
        neighbours: [B, D], of length 1.
    """
    same = [(z * other).sum(-1) > 1 - 1e-5 for other in (neighbours, neighbours.roll(1, 0))]               # [B] each
    return (same[0] & ~same[1]).float().mean()


def of_modules(module: nn.Module) -> dict[str, Tensor]:
    """``teacher_distance`` and ``own_neighbours`` of a method that has a `Teacher`, and a `Queue` that was searched."""
    found = {}
    for part in module.modules():
        if isinstance(part, Teacher):
            found["teacher_distance"] = part.distance()
        if isinstance(part, Queue) and part.lookup is not None:
            found["own_neighbours"] = own_neighbours(*part.lookup)
    return found


class Motion:
    """Whether weights move, seen in a few of each tensor."""

    def __init__(self) -> None:
        self._before: dict[str, Tensor] = {}

    def of(self, method: nn.Module) -> dict[str, Tensor]:
        """``backbone moved`` and, with a `Teacher`, ``teacher moved``: 0 where nothing differs from the last call, else 1."""
        moved = {"backbone moved": self._moved("backbone", method.get_submodule("backbone"))}
        for part in method.modules():
            if isinstance(part, Teacher):
                moved["teacher moved"] = self._moved("teacher", part)
        return moved

    def _moved(self, name: str, module: nn.Module) -> Tensor:
        now = torch.cat([parameter.detach().flatten()[:64].float() for parameter in module.parameters()])
        before = self._before.get(name)
        self._before[name] = now
        return torch.ones_like(now[0]) if before is None else (now != before).any().float()


def jump(losses: Sequence[float], window: int) -> tuple[int, float, float]:
    """The largest loss relative to the median of the ``window`` before it.

    A median near 0 is no measure: 6 times the median deviation from it is added to both.

    Args:
        losses: one per batch, oldest first.

    Returns:
        Its place, how many times the median it is, and that median; factor 0 where too few are known.
    """
    found = (0, 0.0, 0.0)
    for place in range(window, len(losses)):
        before = losses[place - window : place]
        middle = median(before)
        scale = abs(middle) + 6 * median(abs(loss - middle) for loss in before)
        factor = 1 + (losses[place] - middle) / max(scale, 1e-12)
        found = max(found, (place, factor, middle), key=lambda each: each[1])
    return found
