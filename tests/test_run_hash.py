"""Which keys decide the directory of a run: every key of the schema is mutated, one at a time (B12)."""

import dataclasses

from solo.experiment import TRAINER_ARGUMENTS, experiment
from tests.tiny import values

# What is seen, kept, watched or how fast it goes, but never what is learned.
NOT_LEARNED = {
    *("name", "checkpoint", "report", "resume", "loggers", "wandb", "knn", "health", "probe", "extra"),
    *("view_batching", "compile", "auto_batch_size", "auto_lr", "step_timeout"),
    *("accelerator", "devices", "num_nodes", "strategy", "log_every_n_steps", "enable_model_summary", "profiler"),
    *("limit_val_batches", "limit_test_batches", "limit_predict_batches", "check_val_every_n_epoch", "val_check_interval"),
    *("num_sanity_val_steps", "detect_anomaly", "benchmark", "deterministic", "inference_mode"),
    *("data.num_workers", "data.threads", "data.kernel", "data.cache_dir", "data.timeout", "data.download"),
    *("data.accept_changed", "data.val_path", "optimizer.batch_size"),       # the batch counts through the global batch
}


def leaves(thing, path=""):
    """Path, holder and name of each value of nested dataclasses and lists of them."""
    for field in dataclasses.fields(thing):
        value, own = getattr(thing, field.name), f"{path}{field.name}"
        parts = value if isinstance(value, list) else [value]
        nested = [part for part in parts if dataclasses.is_dataclass(part)]
        for part in nested:
            yield from leaves(part, f"{own}.")
        if not nested and own != "trainer":
            yield own, thing, field.name


def test_each_key_changes_the_run_or_is_known_not_to(tmp_path):
    config = experiment(values("all4one", tmp_path))

    def learned():
        return config.run_dir(8).name.rpartition("-")[2]

    before, same, count = learned(), set(), 0
    for key, holder, name in leaves(config):
        kept = getattr(holder, name)
        object.__setattr__(holder, name, f"{kept}-other")
        same |= {key} if learned() == before else set()
        object.__setattr__(holder, name, kept)
        count += 1
    for key in TRAINER_ARGUMENTS:
        kept = dict(config.trainer)
        config.trainer[key] = "another"
        same |= {key} if learned() == before else set()
        config.trainer = kept
        count += 1
    assert count > 100 and learned() == before
    known = {key for key in same if key in NOT_LEARNED or key.split(".")[0] in NOT_LEARNED}
    assert same - known == set(), "changes nothing of the run's hash, and nobody said so"
    hit = {key if key in NOT_LEARNED else key.split(".")[0] for key in known}
    assert hit == NOT_LEARNED, "is said to change nothing, and changes the hash or is no key"
