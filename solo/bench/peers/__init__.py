"""Peers that ``--peer NAME`` knows, besides a folder with a peer's own code (`solo.bench.peers.checkout`)."""

PEERS: dict[str, tuple[str, ...]] = {"torch-compile": ("loss",)}        # by the subjects of `solo.bench` that take them


def named(subject: str) -> list[str]:
    """The names that a subject takes."""
    return [name for name, subjects in PEERS.items() if subject in subjects]
