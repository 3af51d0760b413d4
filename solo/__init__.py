"""Self-supervised learning for images.

``solo.build(yaml_or_config)`` makes a method, ``solo.load_backbone(checkpoint)`` a feature extractor.
``import solo.methods`` gives the plain classes.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from solo.export import load_backbone
    from solo.run import build

__all__ = ["build", "load_backbone"]


def __getattr__(name: str) -> Any:
    if name == "build":
        from solo.run import build

        return build
    if name == "load_backbone":
        from solo.export import load_backbone

        return load_backbone
    raise AttributeError(f"module 'solo' has no attribute {name!r}")
