"""Open files, threads and memory stay as they are while a run goes on."""

import os
import threading
from pathlib import Path

import pytest
import pytorch_lightning as pl

from solo.experiment import experiment
from solo.run import pretrain
from tests.tiny import values

MIB = 1 << 20


class Watch(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, pl_module):
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        self.seen.append((len(os.listdir("/proc/self/fd")), threading.active_count(), memory))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.slow
@pytest.mark.parametrize("epochs", [12, 60])
def test_nothing_grows(tmp_path, epochs):
    """Eight steps an epoch, a checkpoint after each, both loggers and the probe at work: 480 steps in the long one."""
    watch = Watch()
    content = values("nnclr", tmp_path, max_epochs=epochs, loggers=["csv", "tensorboard"], knn={"enabled": True, "every": 10})
    pretrain(experiment(content), [watch])
    files, threads, memory = zip(*watch.seen[epochs // 3 :], strict=True)
    assert len(watch.seen) == epochs
    assert max(files) - files[0] <= 1 and max(threads) == threads[0]        # a checkpoint or a log may be open at that moment
    assert memory[-1] - memory[0] < 24 * MIB, [round(value / MIB) for value in memory[:: max(1, epochs // 10)]]
