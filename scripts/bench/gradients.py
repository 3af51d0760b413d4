"""By which vectors does each method move the embeddings? All seven gradients of UniGrad's family at one batch of real images.

``python scripts/bench/gradients.py [--checkpoint RUN] [--images N] [--out FOLDER]`` takes two augmented views of N CIFAR-10
images through the narrow ResNet of ``scripts/bench/small/unigrad.yaml``, untrained or that of a run. It prints the mean
lengths of the positive and negative parts and the mean cosines between the methods' parts, and writes all of them to
``gradients.csv`` and ``gradients.png``. The images are ``data/cifar10-jpeg.npz`` below ``SOLO_SHARED`` (default:
``../shared``). Under a minute on one CPU thread.
"""

import argparse
import csv
import json
import os
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from solo import checkpoint, config
from solo.console import quiet_libraries
from solo.data.module import DataModule
from solo.errors import ConfigError, reported
from solo.experiment import Experiment, experiment
from solo.losses import unigrad as family
from solo.methods import Method, UniGrad
from solo.run import build

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "scripts" / "bench" / "small" / "unigrad.yaml"
MEMORY = 4  # batches, besides the one shown, that the queue and F are made of; F sees the shown one too, as in training
FORMS = {
    "UniGrad": "unigrad", "SimCLR": "simclr", "MoCo": "moco", "SimSiam": "simsiam", "BYOL": "byol_directpred",
    "Barlow Twins": "barlow", "VICReg": "vicreg",
}
PARTS = ("positive", "negative", "sum")


class Embeddings(NamedTuple):
    """Projections z1, z2 [N, D] with graph, targets m1, m2 [N, D], and targets of other images, ``memory`` [M, D]."""

    z1: Tensor
    z2: Tensor
    m1: Tensor
    m2: Tensor
    memory: Tensor


def load(run: str | None, images: int) -> tuple[Method, Experiment]:
    """A run's method, or an untrained one, and an experiment that reads the images in batches of the given size."""
    file = Path(os.environ.get("SOLO_SHARED", ROOT.parent / "shared")) / "data" / "cifar10-jpeg.npz"
    changes = {"dataset": "npz", "train_path": str(file), "train_size": images * (1 + MEMORY)}
    if run is None:
        content, state = config.load(RECIPE, ["data.dataset=npz"]), None
    else:
        saved = checkpoint.read(checkpoint.resolve(run))
        content, state = json.loads(saved["solo"])["config"], saved["state_dict"]
    content["data"] = {**content["data"], **changes}
    content["optimizer"] = {**content["optimizer"], "batch_size": images}
    settings = experiment(content)
    method = build(settings)
    if not hasattr(method, "projector"):
        raise ConfigError(f"checkpoint={run}: {type(method).__name__} has no projector, whose outputs are compared")
    if state is not None:
        method.load_state_dict(state)
    return method, settings


def embed(method: Method, settings: Experiment) -> Embeddings:
    """Both views of the first batch as in training, and the targets of the next ones."""
    data = DataModule(settings.data, settings.augmentations, settings.optimizer.batch_size, settings.seed)
    first, *others = data.train_dataloader()
    teacher = getattr(method, "teacher", None) or torch.nn.Sequential(method.backbone, method.projector)
    with torch.no_grad():
        m1, m2 = (teacher(view) for view in first.views[:2])
        memory = torch.cat([teacher(view) for batch in others for view in batch.views[:2]])
        z1, z2 = (method.projector(method.backbone(view)) for view in first.views[:2])
    return Embeddings(z1.requires_grad_(), z2.requires_grad_(), m1, m2, memory)


def gradients(form: str, e: Embeddings) -> family.Gradients:
    """A form's gradient with its published constants."""
    constants = UniGrad.Config(form=form).constants
    z = (e.z1, e.z2)
    m = (e.z1.detach(), e.z2.detach()) if form == "simsiam" else (e.m1, e.m2)
    F = family.correlation(*torch.cat([e.memory, *m]).chunk(2))
    match form:
        case "unigrad":
            return family.unigrad_gradients(*z, *m, F, lambda_=constants["lambda_"])
        case "moco":
            return family.moco_gradients(*z, *m, normalize(e.memory, dim=1), temperature=constants["temperature"])
        case "simsiam" | "byol_directpred":
            W, largest = family.direct_predictor(F, constants["eps"])
            return family.directpred_gradients(*z, *m, W, family.direct_metric(F, largest, constants["eps"]))
    stateless = {"simclr": family.simclr_gradients, "barlow": family.barlow_gradients, "vicreg": family.vicreg_gradients}
    return stateless[form](*z, *m, **constants)


def at_projections(g: family.Gradients, e: Embeddings) -> dict[str, Tensor]:
    """Each part [2 N, D] as it arrives at the projections, through the normalisation where the form has one."""

    def through(part: tuple[Tensor, Tensor]) -> Tensor:
        carrier = sum((rows * p).sum() for rows, p in zip(g.rows, part, strict=True))
        return torch.cat(torch.autograd.grad(carrier, (e.z1, e.z2), retain_graph=True))

    positive, negative = through(g.positive), through(g.negative)
    return {"positive": positive, "negative": negative, "sum": positive + negative}


def cosines(parts: list[Tensor]) -> Tensor:
    """Mean over rows of the cosine between every two of [2 N, D] vectors."""
    return torch.stack([torch.stack([cosine_similarity(a, b).mean() for b in parts]) for a in parts])


def table(norms: dict[str, list[float]], similar: dict[str, Tensor]) -> str:
    """Lengths, and cosines with UniGrad's parts."""
    head = f"{'':14}" + "".join(f"{title:>12}" for title in ("|positive|", "|negative|", "ratio"))
    head += "".join(f"{'cos ' + part:>14}" for part in PARTS)
    lines = [head]
    for i, name in enumerate(FORMS):
        positive, negative = norms["positive"][i], norms["negative"][i]
        line = f"{name:14}{positive:12.4g}{negative:12.4g}{negative / positive:12.3g}"
        lines.append(line + "".join(f"{similar[part][0, i].item():14.3f}" for part in PARTS))
    return "\n".join([*lines, "cos: mean cosine with the same part of UniGrad's gradient"])


def draw(norms: dict[str, list[float]], similar: dict[str, Tensor], title: str, path: Path) -> None:
    """Lengths as bars and the cosines of the three parts as matrices."""
    with matplotlib.rc_context({"font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold"}):
        figure = Figure(figsize=(16, 9), dpi=110, layout="constrained")
        figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
        figure.suptitle(title, x=0.01, ha="left", fontsize=14)
        (bars, positive), (negative, both) = figure.subplots(2, 2, width_ratios=[1, 1])
        _bars(bars, norms)
        _matrix(positive, similar["positive"], "Mean cosine between the positive parts")
        _matrix(negative, similar["negative"], "Mean cosine between the negative parts")
        _matrix(both, similar["sum"], "Mean cosine between their sums")
        figure.savefig(path, facecolor="white")


def _bars(axes: Axes, norms: dict[str, list[float]]) -> None:
    axes.set_title("Mean length of a row's parts", loc="left")
    places = torch.arange(len(FORMS)).numpy()
    for part, shift, color in (("positive", -0.2, "#1f6fb4"), ("negative", 0.2, "#e07b1a")):
        drawn = axes.bar(places + shift, norms[part], 0.38, color=color, label=part)
        axes.bar_label(drawn, fmt="{:.2g}", fontsize=8, padding=2)
    axes.set_yscale("log")
    lengths = [*norms["positive"], *norms["negative"]]
    axes.set_ylim(min(lengths) / 4, max(lengths) * 5)
    axes.set_xticks(places, FORMS)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=2, loc="upper left")


def _matrix(axes: Axes, values: Tensor, title: str) -> None:
    axes.set_title(title, loc="left")
    axes.imshow(values.numpy(), cmap="RdBu_r", vmin=-1.4, vmax=1.4, aspect="auto")   # its ends are too dark to read on
    axes.set_xticks(range(len(FORMS)), FORMS, fontsize=9)
    axes.set_yticks(range(len(FORMS)), FORMS)
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            color = "white" if abs(value) > 0.8 else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=9, color=color)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def write(norms: dict[str, list[float]], similar: dict[str, Tensor], path: Path) -> None:
    """One row per number: part, method, other method (empty: the length of the part), value."""
    with path.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["part", "method", "other", "value"])
        for part in PARTS:
            for i, name in enumerate(FORMS):
                writer.writerow([part, name, "", f"{norms[part][i]:.6g}"])
                writer.writerows([part, name, other, f"{similar[part][i, j].item():.6f}"] for j, other in enumerate(FORMS))


def main() -> None:
    """Parse, measure, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", metavar="RUN", help="a run's directory, its name, or a checkpoint; default: untrained")
    parser.add_argument("--images", type=int, default=256, metavar="N")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "gradients", metavar="FOLDER")
    options = parser.parse_args()
    quiet_libraries()
    method, settings = load(options.checkpoint, options.images)
    embeddings = embed(method, settings)
    parts = {name: at_projections(gradients(form, embeddings), embeddings) for name, form in FORMS.items()}
    norms = {part: [of[part].norm(dim=1).mean().item() for of in parts.values()] for part in PARTS}
    similar = {part: cosines([of[part] for of in parts.values()]) for part in PARTS}
    state = f"{settings.method} after {Path(options.checkpoint).name}" if options.checkpoint else "untrained network"
    title = f"Gradients at the projections of {options.images} CIFAR-10 images, two views, {state}"
    print(title, table(norms, similar), sep="\n")
    options.out.mkdir(parents=True, exist_ok=True)
    draw(norms, similar, title, options.out / "gradients.png")
    write(norms, similar, options.out / "gradients.csv")
    print(options.out / "gradients.png")


if __name__ == "__main__":
    with reported():
        main()
