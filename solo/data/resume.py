"""Lightning's own counters, made fit to be resumed from more than once."""

from typing import Any

import pytorch_lightning as pl


class SettledCounters(pl.Callback):
    """Saves an epoch whose last batch is trained as finished.

    A checkpoint saved in ``on_train_batch_end`` of an epoch's last batch, or in the validation behind it, says "epoch not
    processed". Lightning 2.6 continues from it once, but leaves its epoch counters one apart, so that the next
    checkpoint of the resumed run repeats an epoch; with ``max_steps``, one saved in ``on_train_epoch_end`` runs that
    hook twice. Saved as finished, both resume like any checkpoint between epochs. What Lightning does between the last
    batch and the end of the epoch (validation, ``on_train_epoch_end``) is then not made up for on resume; a checkpoint
    that must not lose it is saved in ``on_train_epoch_end``.

    One saved in a validation within an epoch says the same as one of the ``on_train_batch_end`` before it. Lightning would
    go on from it behind that validation only where the resumed run too has one there.
    """

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        loop = checkpoint["loops"]["fit_loop"]
        settle(loop, trainer.num_training_batches)
        batches = loop["epoch_loop.batch_progress"]
        if trainer.validating and batches["current"]["processed"]:
            for part in ("total", "current"):
                batches[part]["completed"] = batches[part]["processed"] - 1


def settle(fit_loop: dict[str, Any], batches_per_epoch: int | float) -> None:
    """Rewrite, in place, the saved state of Lightning's fit loop if it was saved after an epoch's last batch."""
    batch = fit_loop["epoch_loop.batch_progress"]
    epoch = fit_loop["epoch_progress"]["current"]
    ended = epoch["processed"] == epoch["ready"]
    if batch["current"]["processed"] < batches_per_epoch:
        return
    finished = epoch["ready"]
    for part in ("total", "current"):
        fit_loop["epoch_progress"][part] = dict.fromkeys(("ready", "started", "processed", "completed"), finished)
    batch["total"]["completed"] = batch["total"]["processed"]
    batch["is_last_batch"] = False
    optimizer = fit_loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for progress in (batch, fit_loop["epoch_loop.scheduler_progress"], optimizer["step"], optimizer["zero_grad"]):
        progress["current"] = dict.fromkeys(progress["current"], 0)
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] += int(not ended)      # Lightning counts behind validation
