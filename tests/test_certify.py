"""``python -m solo.certify``, and that the certificate fails where a method says or does something wrong."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from solo import batching, certify
from solo.data import module
from solo.dist import rank, world_size
from solo.errors import ConfigError, reported
from solo.methods import METHODS, NNCLR, SCE
from solo.methods.unigrad import CONSTANTS
from solo.nn import Teacher
from solo.testing import Case
from solo.testing.certificate import Row
from solo.testing.compare import Absent, Measured
from solo.testing.invariance import (
    declares_what_it_gathers,
    large_batch_mode_equals_one,
    micro_batches_equal_one,
    ranks_accumulate,
    ranks_equal_one,
    ranks_normalise_alone,
    ranks_share_uneven_images,
)
from tests.conftest import ROOT

HERE = "tests.test_certify:"
STEPS = (ranks_equal_one, ranks_normalise_alone, ranks_accumulate)


class SaysNone(NNCLR):
    gathers = "none"


class SaysStatistics(NNCLR):
    gathers = "statistics"


class SaysKeys(SCE):
    gathers = "keys"


class Moves(NNCLR):
    """Its queue takes a micro-batch at once."""

    def losses(self, batch):
        outputs = super().losses(batch)
        self.queue.land()
        return outputs


class Hurries(SCE):
    """Its teacher follows with each micro-batch."""

    def losses(self, batch):
        self.teacher.update(0.0)
        return super().losses(batch)


class Whole(NNCLR):
    """Its backbone takes all images at once, whatever `micro_batch` is."""

    def losses(self, batch):
        backbone, self.backbone = self.backbone, nn.Identity()
        try:
            return super().losses(batch._replace(views=[backbone(view) for view in batch.views]))
        finally:
            self.backbone = backbone


class Sums(NNCLR):
    """In parts it weighs its loss a little more."""

    def losses(self, batch):
        outputs = super().losses(batch)
        return {**outputs, "loss": outputs["loss"] * (1 + 1e-6 * bool(self.each.micro_batch))}


class Differs(NNCLR):
    """Its second rank weighs its loss a little less."""

    def losses(self, batch):
        outputs = super().losses(batch)
        return {**outputs, "loss": outputs["loss"] * (1 - 1e-6 * rank())}


class Warms(NNCLR):
    """Its loss follows a schedule that counts each process's images apart: as others' at the start of a run only."""

    def losses(self, batch):
        outputs = super().losses(batch)
        return {**outputs, "loss": outputs["loss"] * (1 + self.progress / world_size())}


class Lags(SCE):
    """So does its teacher."""

    def after_step(self, progress):
        return super().after_step(progress / world_size())


class Hastens(NNCLR):
    """So does its learning rate."""

    def on_train_start(self):
        super().on_train_start()
        self._total_steps *= world_size()


class Alone(NNCLR):
    """It takes no config."""

    def __init__(self, backbone):
        super().__init__(backbone, NNCLR.Config())


class Asks(NNCLR):
    """It asks its config for what that has not, in several lines."""

    def __init__(self, backbone, config):
        super().__init__(backbone, config)
        raise ValueError(f"no neighbours\n  in {len(self.queue.keys)} keys")


class Strays(NNCLR):
    """Its second rank has keys of its own."""

    def after_step(self, progress):
        moved = super().after_step(progress)
        self.queue.keys.mul_(1 + 1e-6 * rank())
        return moved


class Couples(SCE):
    """Its loss is a mean over the batch's images, but not over those of the other processes."""

    def losses(self, batch):
        outputs = super().losses(batch)
        return {**outputs, "loss": outputs["loss"] + outputs["feats"].mean(0).square().mean()}


@pytest.mark.slow
@pytest.mark.parametrize("name, found", [("SaysNone", "keys"), ("SaysStatistics", "keys"), ("SaysKeys", "none"),
                                         ("Couples", "statistics")])
def test_a_wrong_declaration_is_refused_and_the_right_one_named(name, found):
    with pytest.raises(AssertionError, match=f"declare gathers = '{found}'"):
        declares_what_it_gathers(Case(HERE + name))


def test_a_memory_that_moves_between_micro_batches_is_found():
    with pytest.raises(AssertionError, match="queue.keys between two micro-batches differs"):
        micro_batches_equal_one(Case(HERE + "Moves"))
    with pytest.raises(AssertionError, match="teacher.* between two micro-batches differs"):
        micro_batches_equal_one(Case(HERE + "Hurries"))


def test_the_large_batch_mode_is_compared_or_said_to_be_absent():
    found = large_batch_mode_equals_one(Case(HERE + "Whole"))
    assert found == Absent("the backbone takes 8 images at once whatever micro_batch is: it does not pass self.each")
    with pytest.raises(AssertionError, match="loss of 1 images at a time differs"):
        large_batch_mode_equals_one(Case(HERE + "Sums"))


def per_part(teacher, x, size):
    return torch.cat([teacher(part) for part in x.split(size)])


def scaled(out, images):
    """The same, with a gradient as if of a mean over these images."""
    return out.detach() + (out - out.detach()) / (1 + images)


@pytest.mark.slow
@pytest.mark.parametrize("place, name, defect, found", [
    (Teacher, "in_parts", torch.no_grad()(per_part), "loss of 3 images at a time, BatchNorms in training, differs"),
    (Teacher, "in_parts", lambda self, x, size: self(x), "loss of 3 images at a time, BatchNorms in training, differs"),
    (batching, "_both_times", lambda _: (nullcontext(), nullcontext()), "backbone.bn1.running_mean of 3 images at a time"),
    (batching, "checkpoint", lambda network, part, **_: network(part).detach(), "only one has .'gradient of backbone"),
    (batching, "checkpoint", lambda network, part, **_: scaled(network(part), len(part)), "gradient of backbone.* of 1 images"),
], ids=["teacher's head in parts", "teacher forgotten", "statistics twice", "no second pass", "second pass scaled"])
def test_a_defect_of_the_large_batch_mode_is_found(place, name, defect, found, monkeypatch):
    monkeypatch.setattr(place, name, defect)
    with pytest.raises(AssertionError, match=found):
        large_batch_mode_equals_one(Case("nnclr" if place is batching else "sce"))


@pytest.mark.slow
@pytest.mark.parametrize("check", STEPS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", ["Differs", "Couples"])
def test_ranks_that_differ_are_found(check, name):
    with pytest.raises(AssertionError, match="on rank 0 of 2 differs"):
        check(Case(HERE + name))


@pytest.mark.slow
@pytest.mark.parametrize("check, name, found", [
    (ranks_equal_one, "Warms", "loss on rank 0 of 2 differs"),
    (ranks_normalise_alone, "Warms", "loss on rank 0 of 2 differs"),
    (ranks_equal_one, "Lags", "after the step, tau on rank 0 of 2 differs"),
    (ranks_normalise_alone, "Lags", "after the step, tau on rank 0 of 2 differs"),
    (ranks_share_uneven_images, "Hastens", "on rank 0 the learning rate of step 2 is .*, due is 0.0351562; "),
])
def test_schedules_that_differ_behind_the_start_of_a_run_are_found(check, name, found):
    """The middle of a run is in the one check, its end in the other, its learning rates in that of a whole run."""
    with pytest.raises(AssertionError, match=found):
        check(Case(HERE + name))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("check", STEPS, ids=lambda check: check.__name__)
def test_four_ranks(check, name):
    check(Case(name), world=4)


@pytest.mark.slow
@pytest.mark.parametrize("name, place, attribute, defect, found", [
    ("Strays", None, "", None, "on rank 0 and on rank 1: queue.keys differ"),
    ("simclr", module, "rank", lambda: 0, "step 1 took other images than one process takes"),
    ("simclr", module.DataModule, "val_dataloader", lambda self: self.clean_loader(False, limit=390), "390 images .* 397"),
], ids=["a queue of its own", "the same images twice", "not all validated"])
def test_what_processes_do_not_share_is_found(name, place, attribute, defect, found, monkeypatch):
    if place is not None:
        monkeypatch.setattr(place, attribute, defect)
    with pytest.raises(AssertionError, match=found):
        ranks_share_uneven_images(Case(name if place else HERE + name))


def test_the_groups_of_batch_norm_are_the_processes():
    """In one process with BatchNorm over all its rows the same comparison fails: the check tells the two apart."""
    from solo.testing import invariance

    batch = invariance._images(Case("nnclr"), 16)
    models = [invariance._model(Case("nnclr"), invariance._by_process(16, groups)) for groups in (2, 1)]
    apart, together = (invariance._step(model, [batch])["loss"] for model in models)
    assert abs(apart - together) > 1e-3


def test_every_form_of_unigrad_declares_something():
    assert {form: Case("unigrad", method_kwargs={"form": form}).build().gathers for form in CONSTANTS} == {
        "unigrad": "statistics", "simclr": "keys", "moco": "none", "simsiam": "statistics",
        "byol_directpred": "statistics", "barlow": "statistics", "vicreg": "statistics",
    }


# --- the command -------------------------------------------------------------------------------------------------------------

ROWS = [
    Row("holds well", "", Measured(1.5e-12, 1e-8)), Row("same bits", "", Measured(0, 0)), Row("trains", "", None),
    Row("in parts", "", Measured(2e-14, 1e-8, "but norms")), Row("in whole", "", Absent("it has none")),
]


@pytest.fixture
def rows(monkeypatch):
    """Stands in for the checks; returns what they find and the case they got."""
    found, cases = list(ROWS), []
    monkeypatch.setattr(certify, "certificate", lambda case, worlds: cases.append((case, worlds)) or iter(found))
    monkeypatch.syspath_prepend("")
    return found, cases


def test_a_table_and_its_exit_code(rows, capsys):
    assert certify.main(["nnclr"]) == 0
    said = capsys.readouterr().out
    assert "nnclr: 4 of 5 hold, 1 absent" in said and "1.5e-12" in said
    assert "in parts: but norms" in said and "in whole: it has none" in said
    rows[0].append(Row("ranks equal one", "loss on rank 1 of 2 differs: by 0.3", Measured(0.3, 1e-8)))
    assert certify.main(["nnclr"]) == 1
    said = capsys.readouterr().out
    assert "4 of 6 hold" in said and "ranks equal one: loss on rank 1 of 2 differs: by 0.3" in said


def test_markdown(rows, capsys):
    assert certify.main(["nnclr", "--markdown"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| `nnclr` | result | largest difference | bound |", "|---|---|---|---|",
        "| holds well | holds | 1.5e-12 | 1e-08 |", "| same bits | holds | 0 | 0 |", "| trains | holds |  |  |",
        "| in parts | holds: but norms | 2.0e-14 | 1e-08 |", "| in whole | absent: it has none |  |  |",
    ]


def test_a_recipe_made_small(rows):
    path = ROOT / "scripts" / "pretrain" / "imagenet" / "sce-multicrop.yaml"
    assert certify.main(["sce", "--config", str(path), "--ranks", "3"]) == 0
    ((case, worlds),) = rows[1]
    config = case.experiment()
    assert worlds == [3] and config.method_kwargs.queue_size == 32
    assert sorted({view.crop_size for view in config.augmentations}) == [8, 16]


@pytest.mark.parametrize("words, line", [
    (["nnclrr"], "did you mean 'nnclr'"),
    (["nowhere:Nothing"], "'nowhere:Nothing' cannot be imported"),
    (["nnclr", "--ranks", "1"], "--ranks must be at least 2 each, got 1"),
    (["sce", "--config", str(ROOT / "scripts/pretrain/nnclr.yaml")], "is a recipe of method 'nnclr', not of 'sce'"),
])
def test_mistakes_are_one_line(words, line, rows):
    with pytest.raises(ConfigError, match=line) as caught:
        certify.main(words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, said", [
    ("Alone", r"Alone(backbone, config): TypeError: Alone.__init__() takes 2 positional arguments but 3 were given"),
    ("Asks", r"Asks(backbone, config): ValueError: no neighbours in 32 keys"),
])
def test_a_method_that_cannot_be_built_is_one_line_and_with_debug_a_traceback(name, said, rows, capsys, monkeypatch):
    monkeypatch.delenv("SOLO_DEBUG", raising=False)
    with pytest.raises(SystemExit) as left, reported():
        certify.main([HERE + name])
    line = f"config error: {HERE}{name} cannot be built as {said} (--debug: where)\n"
    assert left.value.code == 2 and capsys.readouterr().err == line and not rows[1]
    monkeypatch.setenv("SOLO_DEBUG", "1")
    with pytest.raises(ConfigError) as kept, reported():
        certify.main([HERE + name])
    assert isinstance(kept.value.__cause__, (TypeError, ValueError))
