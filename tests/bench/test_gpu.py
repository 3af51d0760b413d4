"""The benchmarks of a GPU, run dry on a CPU: that they run and go on where they were, not what they measure."""

import csv
from types import SimpleNamespace

import pytest
import torch

from solo.bench import epochs, gpu, kernel, measure
from solo.bench.measure import Row, write
from solo.errors import ConfigError, EnvironmentFault, Interrupted
from tests.conftest import ROOT
from tests.test_learn import TINY, npz


def lines(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def dry(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    return tmp_path / "results.csv"


@pytest.mark.parametrize("subject", [kernel, gpu])
def test_without_a_gpu_one_line_and_no_dry_run_among_the_results(subject, dry, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentFault, match="no CUDA device here") as error:
        subject.main([])
    assert error.value.exit_code == 5
    with pytest.raises(ConfigError, match="give --results a file other than"):
        subject.main(["--device", "cpu"])


@pytest.mark.slow
def test_every_kernel_stage_runs_once_and_is_kept(dry, capsys):
    gpu.main(["--device", "cpu", "--results", str(dry)])
    first = lines(dry)
    assert [*dict.fromkeys(line["id"] for line in first)] == ["K0", "KC", "K1", "K2", "K3", "K4", "ES"]
    assert all(float(line["value"]) >= 0 for line in first)
    said = capsys.readouterr().out
    assert "no --data: E1, E2 and the training are left out" in said and "no --tar: E3 from JPEGs is left out" in said
    gpu.main(["--device", "cpu", "--results", str(dry)])
    assert lines(dry) == first and "K4: in" in capsys.readouterr().out


def test_a_stage_that_fails_ends_no_other_and_tells(dry, monkeypatch, capsys):
    def fails():
        raise RuntimeError("CUDA error")

    works = [("K1", fails), ("K2", lambda: [Row("K2", "what", 1.0, "s")]), ("KC", fails)]
    works.append(("K3", lambda: [Row("K3", "of wrong numbers", 1.0, "s")]))
    monkeypatch.setattr(kernel, "stages", lambda *_: works)
    monkeypatch.setattr(gpu.beside, "synthetic", lambda *_: [])
    with pytest.raises(EnvironmentFault, match=r"^failed, see above: K1, KC, EB; all else is in"):
        for name in ("small", "large"):
            monkeypatch.setattr(gpu.beside, name, lambda *_: [])
        monkeypatch.setattr(gpu, "speed", lambda *_: fails())
        (dry.parent / "x.npz").touch()
        gpu.main(["--device", "cpu", "--results", str(dry), "--data", str(dry.parent / "x.npz")])
    said = capsys.readouterr().out
    assert [line["id"] for line in lines(dry)] == ["K2"]
    assert "K1: failed, RuntimeError: CUDA error" in said and "of wrong numbers" in said


def test_a_stage_may_be_left_out_and_kernels_of_unknown_numbers_are_not_written(dry, monkeypatch, capsys):
    works = [(id, lambda id=id: [Row(id, "what", 1.0, "s")]) for id in ("KC", "K1", "K2")]
    monkeypatch.setattr(kernel, "stages", lambda *_: works)
    monkeypatch.setattr(gpu.beside, "synthetic", lambda *_: [Row("ES", "what", 1.0, "s")])
    call = ["--device", "cpu", "--results", str(dry)]
    with pytest.raises(ConfigError, match="^--skip K7: no such stage; they are KC, K1, K2, ES, EB$"):
        gpu.main([*call, "--skip", "K7"])
    gpu.main([*call, "--skip", "KC", "--skip", "K2"])
    assert [line["id"] for line in lines(dry)] == ["ES"] and "K2: left out" in capsys.readouterr().out
    gpu.main([*call, "--skip", "K2"])
    assert [line["id"] for line in lines(dry)] == ["ES", "KC", "K1"]


def test_a_signal_ends_all_stages(dry, monkeypatch):
    def interrupted():
        raise Interrupted("SIGTERM at epoch 1, step 3", 15)

    monkeypatch.setattr(kernel, "stages", lambda *_: [("K1", interrupted), ("K2", lambda: [Row("K2", "what", 1.0, "s")])])
    with pytest.raises(Interrupted):
        gpu.main(["--device", "cpu", "--results", str(dry)])
    assert not dry.exists()


def test_a_training_is_as_long_as_asked_or_as_its_own_method_allows(dry, monkeypatch):
    asked = []
    monkeypatch.setattr(gpu, "board", lambda method, epochs, **_: asked.append((method, epochs)) or [])
    monkeypatch.setattr(gpu, "speed", lambda id, method, _: [Row(id, f"{method}, measured", 4.0, "s/epoch")])
    rows = [Row("E1", "nnclr, CIFAR-10", 2.0, "s/epoch"), Row("E2", "all4one, CIFAR-10", 8.0, "s/epoch")]
    gpu._board("nnclr", 1000.0, rows, [], dry)
    gpu._board("sce", 1000.0, rows, [], dry)
    gpu._board("nnclr", 1.0, rows, [], dry, 200)
    assert asked == [("nnclr", 400), ("sce", 200), ("nnclr", 200)]


def test_rows_of_another_revision_are_not_kept(dry, monkeypatch):
    write([Row("K1", "what", 1.0, "s", "peer", 2.0, 3.0, 4.0, 5.0, 6, (4.0, 5.0))], dry)
    assert list(gpu._kept(dry, "K1")) == [Row("K1", "what", 1.0, "s", "peer", 2.0, 3.0, 4.0, 5.0, 6, (4.0, 5.0))]
    monkeypatch.setattr("solo.bench.measure._revision", lambda: "another")
    assert list(gpu._kept(dry, "K1")) == []


def test_code_without_its_history_is_known_by_its_contents(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measure._revision().startswith("files ")
    (tmp_path / "a.py").write_text("x = 1")
    first = measure._contents(tmp_path)
    (tmp_path / "a.py").write_text("x = 2")
    assert measure._contents(tmp_path) != first


def test_the_kernels_own_tests_count_or_fail(monkeypatch, capsys):
    done = SimpleNamespace(returncode=0, stdout="7 passed in 1 s", stderr="")
    monkeypatch.setattr(kernel.subprocess, "run", lambda *_, **__: done)
    assert [row.value for row in kernel.kernel_tests()] == [7.0]
    done.returncode, done.stdout = 1, "1 failed, 6 passed in 1 s"
    with pytest.raises(AssertionError, match="own tests fail on this GPU"):
        kernel.kernel_tests()
    done.returncode = 4                 # pytest could not begin
    assert kernel.kernel_tests() == [] and "status 4" in capsys.readouterr().out


def test_wrong_numbers_stop_the_run(dry, monkeypatch):
    monkeypatch.setattr(kernel, "nt_xent", lambda z: kernel.plain.nt_xent(z) * 1.1)
    with pytest.raises(AssertionError, match="the gradient of NT-Xent in float32 is off by"):
        kernel.correctness("cpu", kernel.TINY)


def test_a_mark_counts_when_it_is_first_reached():
    seen = epochs.Board()
    for i, accuracy in enumerate((50.0, 86.0, 84.0, 88.5), 1):
        seen.curve.append({"epoch": i, "seconds": 10.0 * i, "val/probe_acc1": accuracy})
    found = {row.what.rpartition(": ")[2]: row.value for row in seen.rows("nnclr")}
    assert found == {"to 85 %": 20.0, "to 88 %": 40.0, "probe after epoch 4": 88.5, "whole training and validation": 40.0}


def test_the_seconds_of_a_training_that_was_cut_off_count():
    seen = epochs.Board()
    seen.load_state_dict({"curve": [{"epoch": 1, "seconds": 100.0}]})
    seen.on_train_start()
    metrics = {"val/probe_acc1": torch.tensor(50.0), "train/loss": torch.tensor(1.0)}
    trainer = SimpleNamespace(callback_metrics=metrics, current_epoch=1)
    seen.on_validation_end(trainer, None)
    last = seen.state_dict()["curve"][-1]
    assert last.pop("seconds") >= 100 and last == {"epoch": 2, "val/probe_acc1": 50.0}


@pytest.mark.slow
def test_epochs_and_a_training_as_long_as_fits(dry, tmp_path, monkeypatch):
    data = tmp_path / "data" / "cifar10.npz"
    npz(data, 120, 40)
    tiny = [*TINY, "data.dataset=npz", f"data.train_path={data}", f"checkpoint.dir={tmp_path / 'runs'}", "precision=32-true"]
    rows = epochs.speed("E1", "nnclr", tiny)
    assert [row.unit for row in rows] == ["images/s", "s/epoch"] and rows[0].value * rows[1].value == pytest.approx(112)
    monkeypatch.setattr(gpu, "_TOO_SHORT", 2)
    assert gpu._board("nnclr", rows[1].value, rows, tiny, dry) == []
    left = 3.5 * rows[1].value * gpu._VALIDATION
    found = gpu._board("nnclr", left, rows, tiny, dry)
    ends = {row.what.rpartition(": ")[2] for row in found}
    assert {"probe after epoch 3", "k-NN after epoch 3", "whole training and validation"} <= ends
    again = gpu._board("nnclr", 0, rows, tiny, dry)             # no second left, but it is there
    assert [row.what for row in again] == [row.what for row in found] and len(lines(dry)) == 1 + len(found)
