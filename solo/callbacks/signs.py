"""What a run shows that learns nothing: measures, and what each says in plain words."""

import math
from collections.abc import Sequence
from statistics import median
from typing import TypeVar

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
    "copy": "{who} is its student: it teaches nothing. Likely causes: momentum.base_tau 0, or no weight moves",
    "far": "the weights of {who} are {value:.2g} times the length of the student's away from them. Likely causes: "
           "momentum.base_tau too near 1, optimizer.lr too high",
    "still teacher": "{who} stands still. Likely cause: momentum.base_tau 1",
    "still backbone": "no weight of the backbone moves. Likely causes: it is frozen or detached from the loss, optimizer.lr 0",
    "own": "{value:.0%} of the neighbours in {who} are the very images that asked for them. Likely causes: the method "
           "fills its queue before it searches, the dataset holds the same images many times",
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


M = TypeVar("M", bound=nn.Module)


def each_of(module: nn.Module, kind: type[M]) -> dict[str, M]:
    """The parts of one kind: by ``""`` where there is one, else by ``/`` and their names."""
    parts = {name: part for name, part in module.named_modules() if isinstance(part, kind)}
    return parts and ({"": next(iter(parts.values()))} if len(parts) == 1 else {f"/{name}": parts[name] for name in parts})


def of_modules(module: nn.Module) -> dict[str, Tensor]:
    """``teacher_distance`` of each `Teacher` and ``own_neighbours`` of each `Queue` that was searched.

    Of several ``teacher_distance/NAME``, ``own_neighbours/NAME``.
    """
    distances = {f"teacher_distance{name}": teacher.distance() for name, teacher in each_of(module, Teacher).items()}
    return distances | {f"own_neighbours{name}": own_neighbours(*queue.lookup)
                        for name, queue in each_of(module, Queue).items() if queue.lookup is not None}


class Motion:
    """Whether weights move, seen in a few of each tensor."""

    def __init__(self) -> None:
        self._before: dict[str, Tensor] = {}

    def of(self, method: nn.Module) -> dict[str, Tensor]:
        """``backbone moved`` and, for each `Teacher`, ``teacher moved``: 0 where nothing differs from the last call, else 1."""
        watched = {"backbone moved": method.get_submodule("backbone")}
        watched |= {f"teacher moved{name}": teacher for name, teacher in each_of(method, Teacher).items()}
        return {name: self._moved(name, part) for name, part in watched.items()}

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
