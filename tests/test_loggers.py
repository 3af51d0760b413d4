"""A logger that fails costs lines, never the run: a server that is down at the start or later, a disk that is full."""

import errno
import json
import shutil

import pytest
import pytorch_lightning as pl
from pytorch_lightning.loggers import CSVLogger

from solo import checkpoint, loggers, spared
from solo.experiment import experiment
from solo.run import pretrain
from solo.spared import Spared
from tests.tiny import values


class Server(CSVLogger):
    """Answers unless it is down."""

    down = False
    reports = 0

    def log_metrics(self, metrics, step=None):
        if Server.down:
            raise ConnectionError("the server cannot be reached\nand has more to say")
        Server.reports += 1


@pytest.fixture(autouse=True)
def up(monkeypatch):
    monkeypatch.setattr(Server, "down", False)
    monkeypatch.setattr(Server, "reports", 0)


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "solo.spared"]


def test_one_warning_in_five_minutes_and_back_again(tmp_path, monkeypatch, caplog):
    clock = [1000.0]
    monkeypatch.setattr(spared.time, "monotonic", lambda: clock[0])
    logger = Spared("x", lambda: Server(tmp_path), rests=True)
    logger.log_metrics({"a": 1.0}, 1)
    Server.down = True
    for step in range(100):
        logger.log_metrics({"a": 1.0}, step)
    said = "logger x fails (ConnectionError: the server cannot be reached and has more to say); training goes on, 1 lost so far"
    assert warnings(caplog) == [said]
    clock[0] += spared.AGAIN
    logger.log_metrics({"a": 1.0}, 100)
    assert len(warnings(caplog)) == 2 and "101 lost so far" in warnings(caplog)[1]
    Server.down = False
    logger.log_metrics({"a": 1.0}, 101)
    assert Server.reports == 2 and warnings(caplog)[2:] == ["logger x works again: 101 calls were lost"]
    for step in range(100):                 # now this, now that: no line for each
        Server.down = not Server.down
        logger.log_metrics({"a": 1.0}, step)
    assert len(warnings(caplog)) == 3


def test_down_at_the_start_is_tried_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(spared.time, "monotonic", lambda: 1000.0)          # refusals that cost nothing

    def make():
        if Server.down:
            raise TimeoutError("no answer")
        return Server(tmp_path)

    Server.down = True
    logger = Spared("x", make, rests=True)
    logger.log_metrics({"a": 1.0}, 1)
    assert logger.name is None and logger.version is None and logger.save_dir is None and logger.experiment is None
    for call in (logger.save, lambda: logger.finalize("success"), lambda: logger.log_hyperparams({"a": 1})):
        call()
    assert len(warnings(caplog)) == 2 and warnings(caplog)[1].startswith("logger x: ")
    Server.down = False
    logger.log_metrics({"a": 1.0}, 2)
    assert Server.reports == 1 and logger.save_dir == str(tmp_path)


def test_a_server_that_lets_one_wait_is_asked_seldom(tmp_path, monkeypatch, caplog):
    """Weights & Biases gives up after 40 s: asked at every step, it would stop a run that it cannot end."""
    clock, asked = [1000.0], []
    monkeypatch.setattr(spared.time, "monotonic", lambda: clock[0])

    def make():
        asked.append(clock[0])
        clock[0] += 40
        raise TimeoutError("no answer")

    logger = Spared("x", make, rests=True)
    while clock[0] < 21_000:
        clock[0] += 0.1                         # a step
        logger.log_metrics({"a": 1.0}, 1)
    assert len(asked) == 5 and 40 * len(asked) <= 0.011 * (clock[0] - 1000)
    assert "training goes on, 1 lost so far" in warnings(caplog)[0] and len(warnings(caplog)) == 5


def test_the_end_of_a_run_is_reported_during_a_rest_as_well(tmp_path, monkeypatch, caplog):
    """Else a server that failed once, hours ago or a minute, never learns that the run is complete."""
    clock, ends = [1000.0], []
    monkeypatch.setattr(spared.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(Server, "finalize", lambda self, status: ends.append(status))

    def slow(self, metrics, step=None):
        clock[0] += 40
        raise TimeoutError("no answer")

    logger = Spared("x", lambda: Server(tmp_path), rests=True)
    with monkeypatch.context() as patch:
        patch.setattr(Server, "log_metrics", slow)
        logger.log_metrics({"a": 1.0}, 1)
    clock[0] += 10
    logger.log_metrics({"a": 1.0}, 2)
    logger.finalize("success")
    assert Server.reports == 0 and ends == ["success"]
    assert warnings(caplog)[1:] == ["logger x: 2 calls were lost"]


def test_what_files_do_not_take_for_a_while_costs_no_later_row(tmp_path, monkeypatch):
    """A disk that took its time to refuse: the next rows, and what a checkpoint goes on behind, are written."""
    clock = [1000.0]
    monkeypatch.setattr(spared.time, "monotonic", lambda: clock[0])
    config = experiment({**values("nnclr", tmp_path), "loggers": ["csv"]})
    (logger,) = loggers.loggers(config, tmp_path)

    def slow(self):
        clock[0] += 10
        full()

    logger.log_metrics({"a": 1.0}, 1)
    with monkeypatch.context() as patch:
        patch.setattr(CSVLogger, "save", slow)
        logger.save()
    logger.log_metrics({"a": 2.0}, 2)
    logger.save()
    (file,) = tmp_path.glob("csv/*/metrics.csv")
    assert [line.split(",")[0] for line in file.read_text().splitlines()[1:]] == ["1.0", "2.0"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_goes_on_when_the_disk_is_free_again(tmp_path, monkeypatch, caplog):
    """Its writer's thread ends at the first failure, and it says so at each later call."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    record = pytest.importorskip("tensorboard.summary.writer.record_writer")
    config = experiment({**values("nnclr", tmp_path), "loggers": ["tensorboard"]})
    (logger,) = loggers.loggers(config, tmp_path)
    logger.log_metrics({"a": 1.0}, 1)
    logger.save()
    with monkeypatch.context() as patch:
        patch.setattr(record.RecordWriter, "write", full)
        for step in (2, 3):
            logger.log_metrics({"a": 1.0}, step)
            logger.save()
    for step in (4, 5):
        logger.log_metrics({"a": 1.0}, step)
        logger.save()
    logger.finalize("success")
    assert "No space left" in warnings(caplog)[0] and "calls were lost" in warnings(caplog)[1]
    read = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in read.Scalars("a")] == [1, 4, 5]


def test_servers_rest_and_files_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda package: True)
    monkeypatch.setattr(pl.loggers, "MLFlowLogger", never)
    config = experiment({**values("nnclr", tmp_path), "loggers": ["csv", "tensorboard", "mlflow"]})
    assert [logger._rests for logger in loggers.loggers(config, tmp_path)] == [False, False, True]


def test_a_call_that_works_says_nothing_of_another_kind_that_does_not(tmp_path, monkeypatch, caplog):
    logger = Spared("x", lambda: Server(tmp_path), rests=False)
    Server.down = True
    monkeypatch.setattr(Server, "save", full)
    logger.save()
    logger.log_metrics({"a": 1.0}, 1)
    Server.down = False
    logger.log_metrics({"a": 1.0}, 2)
    logger.save()
    assert len(warnings(caplog)) == 1
    logger.finalize("success")
    assert warnings(caplog)[1:] == ["logger x: 3 calls were lost"]
    logger.finalize("success")
    assert len(warnings(caplog)) == 2


def test_a_call_that_comes_once_is_not_waited_for(tmp_path, monkeypatch, caplog):
    logger = Spared("x", lambda: Server(tmp_path), rests=False)
    with monkeypatch.context() as patch:
        patch.setattr(Server, "log_hyperparams", full)
        patch.setattr(Server, "log_metrics", full)
        logger.log_hyperparams({"a": 1})
        logger.log_metrics({"a": 1.0}, 1)
    Server.down = False
    logger.log_metrics({"a": 1.0}, 2)
    assert warnings(caplog)[1:] == ["logger x works again: 2 calls were lost"]


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


def never(*arguments, **options):
    raise ConnectionError("refused")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["disk full", "down at the start", "down later"])
def test_a_run_is_complete_without_its_loggers(fault, tmp_path, monkeypatch, caplog):
    quiet = pretrain(experiment(values("nnclr", tmp_path / "quiet", max_epochs=1)))
    if fault == "disk full":
        monkeypatch.setattr(CSVLogger, "save", full)
    elif fault == "down at the start":
        monkeypatch.setattr(pl.loggers, "CSVLogger", never)
    else:
        calls, original = [], CSVLogger.log_metrics

        def later(self, metrics, step=None):
            calls.append(step)
            return original(self, metrics, step) if len(calls) < 4 else never()

        monkeypatch.setattr(CSVLogger, "log_metrics", later)
    caplog.clear()
    result = pretrain(experiment(values("nnclr", tmp_path / "faulty", max_epochs=1)))
    first, last = warnings(caplog)
    assert " fails (" in first and last.startswith("logger csv: ") and last.endswith(" calls were lost")
    one, other = (checkpoint.read(run.checkpoint)["state_dict"] for run in (quiet, result))
    assert all((one[key] == other[key]).all() for key in one)


def test_weights_and_biases_knows_the_settings_that_keep_secrets():
    """With them neither its files nor its server see the command line, the screen, code or git: looked at with 0.31.0."""
    wandb = pytest.importorskip("wandb")
    kept = wandb.Settings(**loggers.WANDB)
    assert kept.x_disable_meta and kept.disable_code and kept.disable_git and kept.console == "off"


@pytest.fixture
def server(monkeypatch):
    """What a server has: run -> (metric, step) of each report; every client of it works as mlflow's does."""
    held = {}

    class Client(CSVLogger):
        def __init__(self, **goes_on):
            self.given = goes_on
            self.run = next(iter(goes_on.values()), "")

        @property
        def version(self):
            return self.run

        def log_metrics(self, metrics, step=None):
            self.run = self.run or f"run{len(held)}"
            held.setdefault(self.run, []).extend((name, step) for name in metrics)

        log_hyperparams = save = finalize = lambda self, *_: None

    monkeypatch.setattr(loggers, "find_spec", lambda package: True)
    for name in ("WandbLogger", "MLFlowLogger", "CometLogger"):
        monkeypatch.setattr(pl.loggers, name, Client)
    return held


def started(folder, name="mlflow"):
    return loggers.Served(name, pl.loggers.MLFlowLogger, folder)


@pytest.mark.parametrize(("name", "keyword"), [("wandb", "id"), ("mlflow", "run_id"), ("comet", "experiment_key")])
def test_a_run_that_goes_on_is_the_same_run_on_a_server(name, keyword, server, tmp_path):
    """A row of two reports of one step, of which an earlier start has sent the first: the second is not lost."""
    (tmp_path / f"{name}.json").write_text(json.dumps({"id": "a-1", "folder": str(tmp_path), "steps": {"loss": 4, "epoch": 4}}))
    logger = started(tmp_path, name)
    for step in (3, 4, 5):
        logger.log_metrics({"loss": 1.0}, step)
        logger.log_metrics({"knn": 1.0, "epoch": 0}, step)
    assert logger._made.given == {keyword: "a-1"}
    assert server == {"a-1": [("knn", 3), ("knn", 4), ("loss", 5), ("knn", 5), ("epoch", 5)]}


def test_what_a_client_may_still_hold_is_sent_again(server, tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(loggers.time, "monotonic", lambda: clock[0])
    logger = started(tmp_path, "wandb")
    for step in range(100):
        logger.log_metrics({"loss": 1.0}, step)
        clock[0] += 1
    kept = json.loads((tmp_path / "wandb.json").read_text())
    assert kept["id"] == "run0" and kept["steps"] == {"loss": 60}           # of the write in second 90: what 60 sent
    logger = started(tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.log_metrics({"loss": 1.0}, 1)
    assert json.loads((tmp_path / "mlflow.json").read_text())["steps"] == {"loss": 1}


def test_an_id_that_is_not_known_yet_is_not_kept(server, tmp_path, monkeypatch):
    """As of comet's before its server answers."""
    logger = started(tmp_path, "comet")
    with monkeypatch.context() as patch:
        patch.setattr(pl.loggers.MLFlowLogger, "version", None)
        logger.log_metrics({"loss": 1.0}, 1)
    assert not (tmp_path / "comet.json").exists()
    logger.log_metrics({"loss": 1.0}, 2)
    assert json.loads((tmp_path / "comet.json").read_text())["id"] == "run0"


@pytest.mark.parametrize("what", ["moved", "copied", "damaged", "on another rank", "full disk"])
def test_whose_a_run_on_a_server_is(what, server, tmp_path, monkeypatch, caplog):
    first, second = tmp_path / "first", tmp_path / "second"
    started(first).log_metrics({"loss": 1.0}, 1)
    if what == "damaged":
        (first / "mlflow.json").write_text('{"id": "run0"}')
    elif what == "on another rank":
        monkeypatch.setattr("pytorch_lightning.utilities.rank_zero_only.rank", 1)
    elif what == "full disk":
        monkeypatch.setattr(loggers, "write_file", full)
    else:
        (shutil.copytree if what == "copied" else shutil.move)(first, second)
    started(second if second.exists() else first).log_metrics({"loss": 1.0}, 2)
    after = {"moved": {"run0": 2}, "full disk": {"run0": 2}, "on another rank": {"run0": 1}}.get(what, {"run0": 1, "run1": 1})
    assert {run: len(rows) for run, rows in server.items()} == after
    assert ("damaged" in caplog.text) == (what == "damaged") and not warnings(caplog)


@pytest.mark.slow
def test_each_step_once_on_a_server_over_a_kill_and_a_resume(server, tmp_path, monkeypatch):
    """And what begins anew, in a folder that an earlier run has used, is another run there."""
    class Dies(Exception):
        pass

    class Killed(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 13:               # behind the checkpoint of step 8
                raise Dies

    killed = Killed()
    content = values("nnclr", tmp_path, max_epochs=2, loggers=["mlflow"])
    with pytest.raises(Dies):
        pretrain(experiment(content), [killed])
    assert len(server["run0"]) and max(step for _, step in server["run0"]) == 12
    pretrain(experiment(content))
    assert list(server) == ["run0"] and len(set(server["run0"])) == len(server["run0"])
    assert [step for name, step in server["run0"] if name == "train/loss"] == list(range(1, 17))
    assert [step for name, step in server["run0"] if name == "val/probe_acc1"] == [7, 15]
    with pytest.raises(Dies):
        pretrain(experiment({**content, "resume": "never"}), [killed])
    run_dir = experiment(content).run_dir(8)
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "last.ckpt").unlink()
    pretrain(experiment(content))
    assert list(server) == ["run0", "run1", "run2"]
    assert [step for name, step in server["run2"] if name == "train/loss"] == list(range(1, 17))
    (first,) = run_dir.glob("checkpoints/*08.ckpt")
    shutil.copy(first, tmp_path / "elsewhere.ckpt")
    shutil.rmtree(first.parent)
    pretrain(experiment({**content, "resume": str(tmp_path / "elsewhere.ckpt")}))
    assert list(server) == ["run0", "run1", "run2", "run3"] and min(step for _, step in server["run3"]) == 9
