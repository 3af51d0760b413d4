"""Defects that libraries of this kind have had, for `tests.test_chaos_defects`: each changes this one in a forked trainer."""

import hashlib
import os
import tempfile
import zipfile
from io import BytesIO
from pathlib import Path

import torch

import solo.callbacks.checkpoint
import solo.data.module
import solo.lease
import solo.methods.base
import solo.start
from solo import checkpoint
from solo.callbacks.checkpoint import Checkpointer
from solo.data.loaders import Order
from solo.data.module import DataModule
from solo.errors import ConfigError
from solo.methods import Method

DEFECTS = {}


def defect(kill=40, then="", says=""):
    """Register a defect: the operation on files before which the first process dies, and what happens before the next.

    Operation 40 is the manifest's rename of the fourth save, at the end of the first of two epochs of four steps.
    """

    def register(function):
        DEFECTS[function.__name__] = (function, kill, then, says)
        return function

    return register


def when_loaded(change):
    def load(self, path, map_location=None, weights_only=None):
        content = checkpoint.read(path)
        change(content)
        return content

    checkpoint.AtomicCheckpointIO.load_checkpoint = load


# --- state that is lost ------------------------------------------------------------------------------------------------


@defect(says="different")
def random_numbers_begin_anew():
    steps = iter(range(100))

    def start(self, batch, batch_idx):
        words = "{}/0/{}/{}".format(self.seed, *divmod(next(steps), 4))
        torch.manual_seed(int.from_bytes(hashlib.blake2b(words.encode(), digest_size=7).digest(), "big"))
        self._set_learning_rates()

    Method.on_train_batch_start = start


@defect(says="different")
def queue_lost():
    when_loaded(lambda content: content["state_dict"]["queue.keys"].copy_(torch.eye(8).repeat(4, 1)))


@defect(says="different")
def queue_pointer_lost():
    when_loaded(lambda content: content["state_dict"]["queue.pointer"].zero_())


@defect(says="different")
def teacher_is_the_student():
    def change(content):
        state = content["state_dict"]
        for name in [name for name in state if name.startswith("teacher.0.")]:
            state[name] = state[name.replace("teacher.0.", "backbone.")].clone()

    when_loaded(change)


@defect(says="different")
def momentum_lost():
    when_loaded(lambda content: content["optimizer_states"][0]["state"].clear())


@defect(says="different")
def batch_statistics_lost():
    when_loaded(lambda content: [v.zero_() for k, v in content["state_dict"].items() if k.endswith("running_mean")])


@defect(says="different")
def probe_lost():
    when_loaded(lambda content: content["callbacks"].pop("OnlineProbe"))


@defect(says="different")
def tau_from_its_base():
    first = []

    def progress(self):
        first.append(self.trainer.global_step)
        return (self.trainer.global_step - first[0]) / self._total_steps

    Method.progress = property(progress)


@defect(says="different")
def learning_rate_from_its_start():
    first, rate = [], solo.methods.base.learning_rate

    def restarted(config, step, *rest):
        first.append(step)
        return rate(config, step - first[0], *rest)

    solo.methods.base.learning_rate = restarted


# --- a place that is lost ----------------------------------------------------------------------------------------------


def placed(epoch=0, batch=0):
    def load(self, state):
        self.set_position(state["epoch"] + epoch, max(state["batch"] + batch, 0))

    DataModule.load_state_dict = load


@defect(kill=50, says="different")
def next_epoch_of_the_data_skipped():
    placed(epoch=1)


@defect(says="different")
def a_batch_seen_twice():
    placed(batch=-1)


@defect(says="different")
def epoch_from_its_beginning():
    placed(batch=-99)


@defect(kill=50, says="order")
def an_epoch_counted_twice():
    def change(content):
        progress = content["loops"]["fit_loop"]["epoch_progress"]["current"]
        progress.update({key: value + 1 for key, value in progress.items()})

    when_loaded(change)


@defect(says="order")
def global_step_off_by_one():
    def change(content):
        loop = content["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]
        loop["optimizer"]["step"]["total"]["completed"] += 1

    when_loaded(change)


@defect(says="different")
def data_seed_of_the_process():
    solo.data.module.Order = lambda seed, *rest: Order(seed + os.getpid(), *rest)


@defect(kill=50, says="different")
def order_of_the_first_epoch_again():
    first, epoch = [], Order.epoch

    def replayed(self, start):
        first.append(start.epoch)
        return epoch(self, start._replace(epoch=start.epoch - first[0]))

    Order.epoch = replayed


@defect(says="different")
def end_of_the_run_not_saved():
    Checkpointer.end_epoch = lambda self, trainer, leaving: None


# --- writing -----------------------------------------------------------------------------------------------------------


def in_halves(path, content):
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])
        file.flush()
        os.fsync(file.fileno())             # where the kill comes
        file.write(content[len(content) // 2 :])


def content_of(write):
    buffer = BytesIO()
    write(buffer)
    return buffer.getvalue()


def written_by(of_checkpoint, of_manifest=None):
    """Other ways to write the two kinds of files: a checkpoint comes as a function that writes it, a manifest as bytes."""
    written = checkpoint.write_file

    def write(path, content):
        other = of_manifest if isinstance(content, bytes) else of_checkpoint
        if other is None:
            return written(path, content)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        other(Path(path), content)
        return checkpoint.digest(path)

    checkpoint.write_file = write


@defect(kill=16, says="unreadable")
def checkpoint_saved_to_its_final_name():
    def straight(path, write):
        with path.open("wb") as file:
            write(file)

    written_by(straight)


@defect(kill=13, says="unreadable")
def manifest_written_in_place():
    written_by(lambda path, write: path.write_bytes(content_of(write)), in_halves)


@defect(kill=19, says="unreadable")
def temporary_file_elsewhere_and_copied():
    def copied(path, write):
        with tempfile.NamedTemporaryFile() as file:
            write(file)
            file.flush()
            in_halves(path, Path(file.name).read_bytes())

    written_by(copied)


@defect(kill=26, says="unreadable")
def manifest_before_the_file():
    def save(content, path, keep=False):
        data = content_of(lambda file: torch.save(dict(content), file))
        checksum, step = hashlib.sha256(data).hexdigest(), content["global_step"]
        entry = checkpoint.Entry(file=path.name, sha256=checksum, step=step, epoch=content["epoch"], keep=keep)
        checkpoint._write_manifest(path.parent, [*checkpoint.manifest(path.parent), entry])
        checkpoint.write_file(path, data)

    checkpoint.save = save


@defect(kill=30, says="unreadable")
def removed_before_the_manifest_forgets():
    def prune(folder, newest=2):
        entries = checkpoint.manifest(folder)
        if len(entries) > newest:
            for entry in entries[:-newest]:
                (folder / entry.file).unlink()
            checkpoint._write_manifest(folder, entries[-newest:])

    checkpoint.prune = prune


def prune_first():
    save, prune = checkpoint.save, checkpoint.prune

    def pruned(content, path, keep=False):
        if path.parent.exists():
            prune(path.parent, newest=1)
        save(content, path, keep)

    checkpoint.save = pruned


@defect(kill=26, says="too few")
def oldest_removed_before_the_save():
    prune_first()


@defect(says="too few")
def one_kept():
    prune = checkpoint.prune
    checkpoint.prune = lambda folder: prune(folder, newest=1)


@defect(says="unreadable")
def numbers_not_finite_saved():
    checkpoint._tensors = lambda content: []
    after = Method.after_step

    def poisoned(self, progress):
        stepped = after(self, progress)
        self.teacher[0].bn1.running_mean[0] = float("nan")
        return stepped

    Method.after_step = poisoned


@defect(kill=36, says="left behind")
def leftovers_stay():
    checkpoint.sweep = solo.start.sweep = lambda folder: None


@defect(says="refused")
def owner_lives_for_ever():
    solo.lease.alive, solo.lease.birth = lambda pid: True, lambda pid: "world.1"


# --- reading -----------------------------------------------------------------------------------------------------------


@defect(then="flip", says="order")
def no_checksum():
    checkpoint.digest = lambda path: checkpoint._known(path)
    zipfile.ZipFile.testzip = lambda self: None


@defect(then="flip", says="refused")
def no_way_back():
    def survey(folder):
        entries = checkpoint.manifest(folder)
        if entries and checkpoint.digest(folder / entries[-1].file) != entries[-1].sha256:
            raise ConfigError("damaged")
        return checkpoint.Survey(entries, {})

    checkpoint.survey = survey


def nothing_there(folder):
    """For a library that then begins anew, where ours would still find that the link leads nowhere."""
    link = folder.parent / "last.ckpt"
    if link.is_symlink():
        link.unlink()
    return checkpoint.Survey([], {})


@defect(then="flip", says="order")
def from_scratch_when_damaged():
    survey = checkpoint.survey

    def forgetful(folder):
        found = survey(folder)
        return nothing_there(folder) if found.damaged else found

    checkpoint.survey = forgetful


@defect(then="flip", says="unreadable")
def damaged_one_not_set_aside():
    checkpoint.repair = lambda folder: None


@defect(then="lose", says="order")
def from_scratch_when_the_manifest_is_lost():
    survey = checkpoint.survey
    checkpoint.survey = lambda folder: survey(folder) if checkpoint.manifest(folder) else nothing_there(folder)


@defect(then="touch", says="order")
def newest_by_its_date():
    checkpoint.newest = lambda folder, found: max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)


@defect(says="order")
def oldest_taken():
    checkpoint.newest = lambda folder, found: min(folder.glob("*.ckpt"), default=None)
