"""The smallest experiment that has everything a real one has."""

from typing import Any

SIZES = {"proj_hidden_dim": 16, "proj_output_dim": 8, "pred_hidden_dim": 16, "queue_size": 32}
BACKBONE = {"name": "resnet18", "kwargs": {"channels": [4, 4, 4, 8], "layers": [1, 1, 1, 1]}, "stem": "imagenet"}
VIEW = {
    "crop_size": 16,
    "num_crops": 2,
    "rrc": {"crop_min_scale": 0.3},
    "horizontal_flip": {"prob": 0.5},
    "color_jitter": {"prob": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1},
}


def values(method: str, folder: Any, **changes: Any) -> dict[str, Any]:
    """Plain config values: 64 images of 16 pixels, batches of 8, so 8 steps an epoch."""
    content: dict[str, Any] = {
        "method": method,
        "method_kwargs": dict(SIZES),
        "backbone": dict(BACKBONE),
        "data": {"dataset": "fake", "size": 16, "train_size": 64, "classes": 4, "num_workers": 0},
        "augmentations": [dict(VIEW)],
        "optimizer": {"batch_size": 8, "lr": 1.0, "kwargs": {"eta": 0.02, "clip_lr": True, "exclude_bias_n_norm": True}},
        "scheduler": {"warmup_epochs": 1},
        "checkpoint": {"dir": str(folder)},
        "report": {"enabled": False},
        "health": {"enabled": True},
        "knn": {"enabled": False},
        "loggers": ["csv"],
        "max_epochs": 3,
        "accelerator": "cpu",
        "devices": 1,
        "log_every_n_steps": 1,
    }
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(content.get(key), dict) and isinstance(value, dict) else value
    return content
