"""The writer of checkpoints: whole or not at all, checked when read, never running code."""

import json
import os

import pytest
import torch

from solo import checkpoint
from solo.errors import ConfigError, NumericsError


def content(step=1, value=1.0):
    return {"state_dict": {"w": torch.full((64,), value)}, "global_step": step, "epoch": 0, "solo": json.dumps({"method": "x"})}


def test_round_trip_and_manifest(tmp_path):
    for step in (3, 1, 2):
        checkpoint.save(content(step), tmp_path / f"{step}.ckpt")
    assert [entry.step for entry in checkpoint.manifest(tmp_path)] == [1, 2, 3]
    assert checkpoint.newest(tmp_path).name == "3.ckpt"
    assert torch.equal(checkpoint.read(tmp_path / "2.ckpt")["state_dict"]["w"], torch.ones(64))
    assert checkpoint.digest(tmp_path / "2.ckpt") == checkpoint.manifest(tmp_path)[1].sha256


def test_prune_keeps_the_newest_and_those_to_keep(tmp_path):
    for step in range(1, 6):
        checkpoint.save(content(step), tmp_path / f"{step}.ckpt", keep=step == 2)
        checkpoint.prune(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["2.ckpt", "4.ckpt", "5.ckpt"]


@pytest.mark.parametrize("moment", ["write", "replace", "manifest"])
def test_an_interrupted_write_leaves_the_last_one_in_force(tmp_path, monkeypatch, moment):
    checkpoint.save(content(1), tmp_path / "1.ckpt")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    if moment == "write":
        monkeypatch.setattr(torch, "save", lambda state, file: (file.write(b"half"), interrupted()))
    elif moment == "replace":
        monkeypatch.setattr(os, "replace", interrupted)
    else:
        monkeypatch.setattr(checkpoint, "_write_manifest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(content(2), tmp_path / "2.ckpt")
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path).name == "1.ckpt"
    assert not list(tmp_path.glob(".*.tmp"))


def test_every_flipped_bit_is_found(tmp_path):
    checkpoint.save(content(), tmp_path / "1.ckpt")
    good = (tmp_path / "1.ckpt").read_bytes()
    for position in range(0, len(good), 37):
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        (tmp_path / "1.ckpt").write_bytes(bad)
        with pytest.raises(ConfigError, match="damaged"):
            checkpoint.read(tmp_path / "1.ckpt")


def test_non_finite_weights_are_refused(tmp_path):
    checkpoint.save(content(1), tmp_path / "1.ckpt")
    with pytest.raises(NumericsError, match="step 2"):
        checkpoint.save(content(2, float("nan")), tmp_path / "2.ckpt")
    assert checkpoint.newest(tmp_path).name == "1.ckpt" and not (tmp_path / "2.ckpt").exists()


class Exploit:
    def __reduce__(self):
        return os.system, ("touch exploited",)


def test_code_in_a_file_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "solo": "{}", "x": Exploit()}, tmp_path / "bad.ckpt")
    with pytest.raises(ConfigError, match="cannot be loaded as tensors and plain values"):
        checkpoint.read("bad.ckpt")
    assert not (tmp_path / "exploited").exists()


def test_what_is_not_a_checkpoint_is_named(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    for name, reason in (
        ("other.ckpt", "not a checkpoint of solo"),
        ("text.ckpt", "cannot be loaded"),
        ("none.ckpt", "does not exist"),
    ):
        with pytest.raises(ConfigError, match=reason):
            checkpoint.read(tmp_path / name)


def test_misfit_names_keys():
    model = {"a": torch.zeros(2), "b": torch.zeros(2)}
    assert checkpoint.misfit(model, dict(model)) == ""
    text = checkpoint.misfit(model, {"a": torch.zeros(3), "c": torch.zeros(1)})
    assert text == "missing 1: b; unexpected 1: c; shape of: a (3,) instead of (2,)"


def test_a_run_is_found_by_file_directory_and_name(tmp_path):
    run = tmp_path / "quick-0123abcd"
    checkpoint.save(content(), run / "checkpoints" / "step-1.ckpt")
    for name in (run / "checkpoints" / "step-1.ckpt", run, tmp_path / "quick"):
        assert checkpoint.resolve(name).name == "step-1.ckpt"
    checkpoint.save(content(), tmp_path / "quick-99999999" / "checkpoints" / "step-1.ckpt")
    with pytest.raises(ConfigError, match="quick-0123abcd.*quick-99999999.*name one"):
        checkpoint.resolve(tmp_path / "quick")
    with pytest.raises(ConfigError, match="does not exist"):
        checkpoint.resolve(tmp_path / "slow")
