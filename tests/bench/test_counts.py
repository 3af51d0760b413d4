"""What would make the host wait for a GPU is seen on the CPU: what torch looks at to know how large a result is, and reads."""

import pytest
import torch
from torch import Tensor

from solo.bench.counts import Waits

X, MASK, TIMES, WHOLE = torch.ones(4, 2), torch.tensor([True, False, True, True]), torch.tensor([1, 2, 0, 3]), torch.arange(4)


def put(index: Tensor, value: object) -> None:
    X.clone()[index] = value


@pytest.mark.parametrize(("call", "name"), [
    (lambda: X[MASK], "mask"),
    (lambda: put(MASK, torch.zeros(3, 2)), "__setitem__"),
    (lambda: X.clone().index_put_((MASK,), torch.zeros(3, 2)), "index_put_"),
    (lambda: torch.where(MASK), "where"),
    (lambda: X.to("cpu"), "to"),
    (lambda: X.to(device="cpu"), "to"),
    (lambda: X.repeat_interleave(TIMES, 0), "repeat_interleave"),
    (lambda: torch.repeat_interleave(X, repeats=TIMES, dim=0), "repeat_interleave"),
    (lambda: torch.repeat_interleave(TIMES), "repeat_interleave"),
    (lambda: torch.argwhere(MASK), "argwhere"),
    (lambda: torch.allclose(X, X), "allclose"),
    (lambda: X.allclose(X), "allclose"),
    (lambda: X.masked_select(X > 0), "masked_select"),
    (lambda: WHOLE.unique(), "unique"),
    (lambda: torch.unique(WHOLE), "unique"),
    (lambda: WHOLE.unique_consecutive(), "unique_consecutive"),
    (lambda: WHOLE.bincount(), "bincount"),
    (lambda: f"{X[0, 0]}", "__format__"),
    (lambda: X[0, 0].item(), "item"),
    (lambda: 1 if X[0, 0] else 0, "__bool__"),
])
def test_what_waits_is_counted_once(call, name):
    with Waits() as waits:
        call()
    assert waits.names == {name: 1}


@pytest.mark.parametrize("call", [
    lambda: put(MASK, 0.0),                 # torch fills it in (`masked_fill_`)
    lambda: put(WHOLE, torch.zeros(4, 2)),
    lambda: X[WHOLE],
    lambda: torch.where(MASK[:, None], X, X),
    lambda: X.where(MASK[:, None], X),
    lambda: X.masked_fill(MASK[:, None], 0.0),
    lambda: X.to(torch.float64),
    lambda: X.to("cpu", non_blocking=True),
    lambda: X.repeat_interleave(2, 0),
    lambda: X.repeat_interleave(TIMES, 0, output_size=6),
])
def test_what_does_not_wait_is_not(call):
    with Waits() as waits:
        call()
    assert not waits.names
