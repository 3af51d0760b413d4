"""What a config holds of secrets stays out of everything a run writes or sends."""

import json

import pytest
import pytorch_lightning as pl
import torch
import yaml

from solo import checkpoint, config, loggers, redaction
from solo.errors import ConfigError, reported
from solo.eval.offline import evaluate_knn
from solo.experiment import experiment
from solo.redaction import HIDDEN, redacted
from solo.run import pretrain
from tests.tiny import values

FROM_ENVIRONMENT = "swordfish-7391"
WRITTEN = "sk-0a1b2c3d4e"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Composes a config that holds secrets in every way."""
    monkeypatch.setattr(redaction, "_from_environment", {})
    monkeypatch.setenv("SOLO_TEST_SECRET", FROM_ENVIRONMENT)
    extra = {
        "api_key": WRITTEN, "wandb_key": WRITTEN, "hub": {"AuthToken": WRITTEN}, "list": [{"db_password": WRITTEN}],
        "note": "${oc.env:SOLO_TEST_SECRET}", "again": "${extra.note}/again",
        "address": f"https://me:{WRITTEN}@x@host:80/path", "git": f"https://{WRITTEN}@host/x",
        "inside": "x-${oc.env:SOLO_TEST_SECRET}-y", "num_tokens": 3, "tokens": True,
    }
    content = values("nnclr", tmp_path / "runs", extra=extra, max_epochs=1, loggers=["csv", "tensorboard"])
    content["data"]["cache_dir"] = f"{tmp_path}/${{oc.env:SOLO_TEST_SECRET}}"
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    return lambda *overrides: experiment(config.load(tmp_path / "tiny.yaml", overrides))


def test_nothing_a_run_writes_holds_a_secret(load, tmp_path, caplog):
    caplog.set_level("INFO", "solo")
    bound = load()
    assert bound.extra["again"] == f"{FROM_ENVIRONMENT}/again" and bound.extra["api_key"] == WRITTEN      # the run has them
    result = pretrain(bound)
    evaluate_knn({"checkpoint": str(result.checkpoint), "data": {"cache_dir": f"{tmp_path}/{FROM_ENVIRONMENT}"}, "k": [1]})
    files = [path for path in result.run_dir.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.json", "results.json", "metrics.csv", "manifest.json", "last.ckpt"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    for path in files:
        for secret in (FROM_ENVIRONMENT, WRITTEN):
            assert secret.encode() not in path.read_bytes(), f"{path} holds {secret}"
    assert FROM_ENVIRONMENT not in caplog.text and WRITTEN not in caplog.text
    kept = json.loads((result.run_dir / "config.json").read_text())
    assert kept["extra"]["api_key"] == kept["extra"]["hub"]["AuthToken"] == HIDDEN and kept["extra"]["num_tokens"] == 3
    assert kept["extra"]["address"] == f"https://{HIDDEN}@host:80/path"
    assert kept["extra"]["inside"] == "x-${oc.env:SOLO_TEST_SECRET}-y" and kept["extra"]["tokens"] is True
    assert checkpoint.provenance(checkpoint.read(result.checkpoint), "x")["config"] == kept
    experiment(kept)                                                        # and it is a config


@pytest.mark.slow
def test_a_run_goes_on_where_secrets_were_hidden(load, caplog):
    caplog.set_level("INFO", "solo")
    first = pretrain(load())
    again = pretrain(load("max_epochs=2"))
    assert again.run_dir != first.run_dir or "was" not in caplog.text
    pretrain(load())
    assert "nothing to train" in caplog.text and "note:" not in caplog.text


@pytest.mark.parametrize("secret", [WRITTEN, 90125], ids=["text", "number"])
def test_older_records_that_hold_secrets_are_compared_and_not_spoken(tmp_path, monkeypatch, secret):
    """A secret that stays is no change, in whichever way it was recorded; one that changes is one without saying it."""
    monkeypatch.setattr(redaction, "_from_environment", {})
    bound = experiment(values("nnclr", tmp_path))
    bound.backbone.kwargs = {"api_key": secret, "keys_of": {"hf_token": [secret]}}
    older, own = bound.to_json(), bound.record()
    assert own["backbone"]["kwargs"] == {"api_key": HIDDEN, "keys_of": {"hf_token": [HIDDEN]}}
    assert bound.changes(older) == bound.changes(own) == {}
    redaction.remember(FROM_ENVIRONMENT, "SOLO_TEST_SECRET")
    bound.data.train_path = FROM_ENVIRONMENT                # of a block whose texts may come out of the environment
    older["data"]["train_path"] = FROM_ENVIRONMENT
    assert bound.changes(older) == {}
    bound.backbone.kwargs["api_key"] = 90126
    older["data"]["train_path"] += "/other"
    assert bound.changes(older) == {
        "backbone.kwargs.api_key": (HIDDEN, HIDDEN),
        "data.train_path": ("${oc.env:SOLO_TEST_SECRET}/other", "${oc.env:SOLO_TEST_SECRET}"),
    }


def test_numbers_and_what_lists_and_blocks_hold_are_secrets_too_and_counts_are_not():
    shown = {"num_tokens": 3, "tokens": True, "reg_tokens": 4, "class_token": True, "token_dim": 8, "password": None}
    secret = {"api_key": 12345, "pin": {"password": 0.5}, "hf_token": 7, "tokens": ["a"],
              "credentials": {"user": "me", "n": [1]}}
    assert redacted(shown) == shown
    assert redacted(secret) == {"api_key": HIDDEN, "pin": {"password": HIDDEN}, "hf_token": HIDDEN, "tokens": [HIDDEN],
                                "credentials": {"user": HIDDEN, "n": [HIDDEN]}}


def test_what_a_backbone_is_built_from_again_is_shown(tmp_path):
    """(hidden) would be taken for true. Whole words are secrets, and not those that a model's tokens are called by."""
    kwargs = {"class_token": 0, "cls_token": "learned", "summary_token": 1, "reg_tokens": 4, "num_tokens": "4",
              "token_mixers": ["a", "b"], "token_dim": "8", "tokenizer": {"kind": "bpe"}, "class_tokens": ["x"],
              "token": {"dim": 8}}
    bound = experiment(values("nnclr", tmp_path))
    bound.backbone.kwargs = kwargs
    assert bound.record()["backbone"]["kwargs"] == redacted({"backbone": {"kwargs": kwargs}})["backbone"]["kwargs"] == kwargs


@pytest.mark.parametrize("key", ["token_value", "access_token_v2", "bot_token_prod", "slack_reg_token", "tokenFile"])
def test_any_token_that_is_no_models_is_hidden(key):
    assert redacted({"extra": {key: WRITTEN}}) == {"extra": {key: HIDDEN}}


def test_the_block_that_a_key_stands_in_says_what_it_opens():
    secret = {"wandb": {"key": WRITTEN}, "auth": {"key": 12345}, "api": {"keys": [WRITTEN]}, "comet": {"key": WRITTEN},
              "mlflow": {"key": WRITTEN}}
    assert redacted(secret) == {"wandb": {"key": HIDDEN}, "auth": {"key": HIDDEN}, "api": {"keys": [HIDDEN]},
                                "comet": {"key": HIDDEN}, "mlflow": {"key": HIDDEN}}
    assert redacted({"memory": {"key": "x"}}) == {"memory": {"key": "x"}}


@pytest.mark.parametrize("text", [
    f"https://host/x?token={WRITTEN}&size=4", f"https://host/x?size=4&api_key={WRITTEN}", f"https://host/x?sig={WRITTEN}",
    f"s3://host/x?X-Amz-Signature={WRITTEN}", f"https://host/#access_token={WRITTEN}", f"https://me:a/{WRITTEN}@host/x",
    f"https://me:{WRITTEN}/a@host/x", f"curl -H 'Authorization: Bearer {WRITTEN}' x", f"{{'authorization': '{WRITTEN}'}}",
    f"bearer {WRITTEN}",
])
def test_who_asks_is_hidden_in_addresses_and_headers(text):
    for shown in (redacted(text), redaction.spoken(text)):
        assert WRITTEN not in shown and HIDDEN in shown and text[:6] == shown[:6] and text[-1] in (WRITTEN[-1], shown[-1])


@pytest.mark.parametrize("text", [
    "https://host:8080/x@main", "https://host/x@v1", "oci://host:5000/x@sha256:1", "https://host/x?page=3&monkey=4&num_keys=5",
    "the Authorization header is missing", "bearer of news", "timm/vit_base.augreg@x", "data.train_path=/a/b",
])
def test_addresses_without_a_secret_are_shown(text):
    assert redacted(text) == redaction.spoken(text) == text


def test_words_of_the_schema_stay_so_that_a_checkpoint_says_what_it_holds(tmp_path, monkeypatch):
    """Also where another key took the same word out of the environment."""
    monkeypatch.setattr(redaction, "_from_environment", {})
    for variable, value in {"ARCH": "resnet18", "MODE": "auto", "PLACE": str(tmp_path), "METHOD": "nnclr"}.items():
        monkeypatch.setenv(variable, value)
    content = values("nnclr", "${oc.env:PLACE}/runs", max_epochs=1, loggers=[])
    content |= {"method": "${oc.env:METHOD}", "resume": "${oc.env:MODE}", "extra": {"mine": "${oc.env:ARCH}"}}
    content["backbone"]["name"] = "${oc.env:ARCH}"
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    bound = experiment(config.load(tmp_path / "tiny.yaml"))
    result = pretrain(bound)
    kept = json.loads((result.run_dir / "config.json").read_text())
    assert kept["backbone"] == bound.to_json()["backbone"] and (kept["method"], kept["data"]["kernel"]) == ("nnclr", "auto")
    assert kept["extra"]["mine"] == "${oc.env:ARCH}" and kept["checkpoint"]["dir"] == "${oc.env:PLACE}/runs"
    experiment(kept)
    bound.backbone.kwargs = {"hf_token": WRITTEN}
    assert bound.record()["backbone"]["kwargs"] == {"hf_token": HIDDEN}
    redaction._from_environment.clear()
    assert evaluate_knn({"checkpoint": str(result.checkpoint), "k": [1]})
    with pytest.raises(ConfigError, match=r"names data.val_path=\$\{oc.env:PLACE\}/val only .*: give data.val_path="):
        state = torch.load(result.checkpoint, weights_only=True)
        facts = json.loads(state["solo"])
        facts["config"]["data"]["val_path"] = "${oc.env:PLACE}/val"
        torch.save({**state, "solo": json.dumps(facts)}, tmp_path / "x.ckpt")
        evaluate_knn({"checkpoint": str(tmp_path / "x.ckpt"), "k": [1]})


def test_short_texts_are_not_looked_for_inside_others(monkeypatch):
    monkeypatch.setattr(redaction, "_from_environment", {})
    redaction.remember("a1", "SHORT")
    redaction.remember("", "EMPTY")
    assert redacted({"x": "a1", "y": "a1b", "z": "", "n": [1, None, 2.5]}) == {
        "x": "${oc.env:SHORT}", "y": "a1b", "z": "", "n": [1, None, 2.5]}


def test_an_error_line_names_paths_of_the_environment_and_no_secret_of_it(monkeypatch, capsys):
    monkeypatch.setattr(redaction, "_from_environment", {})
    redaction.remember(FROM_ENVIRONMENT, "HF_TOKEN")
    redaction.remember("/scratch/me", "SCRATCH")
    with pytest.raises(SystemExit), reported():
        raise ConfigError(f"data.train_path=/scratch/me/{FROM_ENVIRONMENT} does not exist")
    assert capsys.readouterr().err == "config error: data.train_path=/scratch/me/${oc.env:HF_TOKEN} does not exist\n"


def test_keys_called_like_a_secret():
    hidden = ("token", "HF_TOKEN", "client_secret", "password", "passwd", "api_key", "apikey", "ACCESS_KEY", "credentials",
              "wandb_key", "tokens", "AuthToken", "github-token", "personal_access_token", "hf_token_2", "ssh_key", "hf_key",
              "signing_key", "access_key_id", "sshKey", "api-key", "Authorization")
    shown = ("key", "keys", "pooling_key", "name", "pass_through", "monkey", "epochs", "keyboard", "key_dim", "num_keys")
    content = redacted({key: "text" for key in (*hidden, *shown)})
    assert {key for key, value in content.items() if value == HIDDEN} == set(hidden)


def test_wandb_is_sent_neither_code_nor_config(load, tmp_path, monkeypatch):
    sent = []

    class Fake(pl.loggers.CSVLogger):
        def __init__(self, **arguments):
            sent.append(arguments)
            super().__init__(tmp_path / "fake", name="fake")

        def log_hyperparams(self, *arguments):
            sent.append(arguments)

    monkeypatch.setattr(pl.loggers, "WandbLogger", Fake)
    monkeypatch.setattr(loggers, "find_spec", lambda name: True)
    pretrain(load("wandb.enabled=true", "wandb.project=mine"))
    (only,) = sent
    assert only["save_code"] is False and only["settings"]["disable_code"] and only["settings"]["disable_git"]
    assert only["project"] == "mine" and FROM_ENVIRONMENT not in str(only) and WRITTEN not in str(only)
