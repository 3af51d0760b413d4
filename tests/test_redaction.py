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
from tests.attacks.sandbox import MIB, SECONDS, confined
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
    shown = {"memory": {"key": "x"}, "api": {"keypoints": "x"}, "method_kwargs": {"client_keys": 4096, "master_keys": 2}}
    assert redacted(shown) == shown
    assert redacted({"method_kwargs": {"client_keys": "x", "master_key": 2}, "x": {"api_keys": [3]}}) == {
        "method_kwargs": {"client_keys": HIDDEN, "master_key": HIDDEN}, "x": {"api_keys": [HIDDEN]}}


@pytest.mark.parametrize(("text", "shown"), [
    ("https://host/x?token=S&size=4", "https://host/x?token=(hidden)&size=4"),
    ("https://host/x?size=4&api_key=S", "https://host/x?size=4&api_key=(hidden)"),
    ("https://host/x?sig=S", "https://host/x?sig=(hidden)"),
    ("https://host/x?pwd=S", "https://host/x?pwd=(hidden)"),
    ("s3://host/x?X-Amz-Signature=S", "s3://host/x?X-Amz-Signature=(hidden)"),
    ("https://host/#access_token=S", "https://host/#access_token=(hidden)"),
    ("https://me:pa?ss@host/x", "https://(hidden)@host/x"),
    ("https://me:a/sk-0a1b@host/x", "https://(hidden)@host/x"),
    ("https://me:sk-0a1b/a@host/x", "https://(hidden)@host/x"),
    ("https://me:1234/SECRET@host", "https://(hidden)@host"),
    ("https://me:'a/b'@host", "https://(hidden)@host"),
    ("https://me:a@2x.org/x@2x.png", "https://(hidden)@2x.org/x@2x.png"),
    ("https://me:1234/s3cr3t@host", "https://(hidden)@host"),
    ("curl -H 'Authorization: Bearer S' x", "curl -H 'Authorization: (hidden)' x"),
    ("{'authorization': 'S', 'page': 3}", "{'authorization': '(hidden)', 'page': 3}"),
    ("Authorization: ApiKey abc\nAccept: a", "Authorization: (hidden)\nAccept: a"),
    ("Authorization: Negotiate XYZ", "Authorization: (hidden)"),
    ('Authorization: Token token="S"', "Authorization: (hidden)"),
    ('Authorization: Digest username="me", response="S"', "Authorization: (hidden)"),
    ("Authorization: AWS4-HMAC-SHA256 Credential=a/b, Signature=S", "Authorization: (hidden)"),
    ("authorization = required", "authorization = (hidden)"),
    ("curl -H 'Authorization: Digest user=\"me\", response=\"S\"' x", "curl -H 'Authorization: (hidden)' x"),
    (r'{"Authorization": "Token token=\"S\"", "page": 3}', '{"Authorization": "(hidden)", "page": 3}'),
    (r'"{\"Authorization\": \"Basic S\", \"page\": 3}"', r'"{\"Authorization\": \"(hidden)\", \"page\": 3}"'),
    ("bearer sk-0a1b2c3d4e, x", "bearer (hidden), x"),
    ("X-Api-Key: S", "X-Api-Key: (hidden)"),
    ("X-Auth-Token: 123", "X-Auth-Token: (hidden)"),
    ('{"X-Auth-Token": "S T"}', '{"X-Auth-Token": "(hidden)"}'),
    ("--api-key=S --seed=1", "--api-key=(hidden) --seed=1"),
    ("wandb.key=S,seed=1", "wandb.key=(hidden),seed=1"),
    ("a token=S in a text", "a token=(hidden) in a text"),
])
def test_who_asks_is_hidden_in_addresses_headers_and_what_a_name_is_given(text, shown):
    assert redacted(text) == redaction.spoken(text) == redacted(shown) == shown


@pytest.mark.parametrize("text", [
    "https://host:8080/x@main", "https://host/x@v1", "oci://host:5000/x@sha256:1", "https://host/x?page=3&monkey=4&num_keys=5",
    "the Authorization header is missing", "authorization failed: no", "bearer of news", "401: Bearer authentication required",
    "timm/vit_base.augreg@x", "data.train_path=/a/b", "http://host:8080?mail=me@x", "http://host:8080/Path?mail=me@x",
    "s3://bucket:prefix/file@2x.png", "oci://host:5000/v2/resnet50@sha256:1", '{"a":"https://host:8080/X","b":"me@x"}',
    "https://host?num_tokens=196", "https://host?tokenizer=clip", "num_tokens=4, class_token=true",
    "backbone.kwargs.class_token=learned", "method_kwargs.client_keys=4096",
])
def test_texts_without_a_secret_are_shown(text):
    assert redacted(text) == redaction.spoken(text) == text


def searched(text: str) -> bool:
    """Whether that ends within the processor time of `tests/attacks`, in a child."""
    end = confined(lambda: redaction.spoken(text), 256 * MIB)
    return end.kind == "returned" and end.seconds < SECONDS


@pytest.mark.parametrize("part", ["://a:x", "token", "secret"])
def test_a_text_of_1_mib_is_searched_in_time_linear_in_it(part):
    assert searched("?" + part * (MIB // len(part)))


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", '"@', "secret=1"])
@pytest.mark.parametrize("part", [
    "://a:x", "://a:1/", "://a:1/x/", "a@2x", "token", "?token", "token=", "num_tokens=", "token: ", "token='",
    "'authorization:'", "method_kwargs.",
])
def test_more_texts_of_1_mib_are_searched_in_time_linear_in_them(part, end):
    assert searched("?" + part * (MIB // len(part)) + end)


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
              "signing_key", "access_key_id", "sshKey", "api-key", "Authorization", "accessKeyId", "storage_keys", "aws_key",
              "openai_key", "s3_key", "passphrase", "db_pass", "pwd", "cookie", "jwt")
    shown = ("key", "keys", "pooling_key", "name", "pass_through", "monkey", "epochs", "keyboard", "key_dim", "num_keys",
             "api_keypoints", "deploy.keyboard", "hf_keyword", "tokenizer")
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


@pytest.mark.parametrize("secret", ["ghp_" + "a1B2" * 9, "hf_" + "aBcD" * 8, "sk-" + "a1B2" * 8, "glpat-" + "a1-B2" * 4,
                                    "sk-proj-abcDEF123_4567abcDEF123", "sk-ant-api03-AAAA1111AAAA_BBBB-CC",
                                    "github_pat_11AB22CD33_" + "a1B2" * 8])
def test_what_a_service_issues_is_known_by_its_shape(secret):
    for text, shown in ((secret, HIDDEN), (f"a run with {secret}, then", f"a run with {HIDDEN}, then")):
        assert redacted({"extra": {"note": text}}) == {"extra": {"note": shown}} and redaction.spoken(text) == shown


@pytest.mark.parametrize("name", ["hf_hub_download_of_a_model_that_is_large", "hf_resnet-50-imagenet-pretrained",
                                  "sk-learn-baseline-of-november"])
def test_names_that_begin_like_a_token_are_shown(name):
    assert redacted(name) == redaction.spoken(name) == name


@pytest.mark.parametrize("text", ["{'api_key': ['S1', 'S2']}", '{"tokens": ["S1", "S2"]}', "password: {value: S1}",
                                  "password=u'S1'", 'password: """S1"""', "api_key=''S1''"])
def test_secrets_in_lists_blocks_and_all_kinds_of_quotes_are_hidden(text):
    assert "S1" not in redaction.spoken(text) and "S2" not in redaction.spoken(text) and HIDDEN in redaction.spoken(text)
