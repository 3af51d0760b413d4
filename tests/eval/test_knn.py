"""k-NN: golden values of the official code, labels -1, chunks, the number of classes."""

import pytest
import torch

from solo.errors import DataError
from solo.eval.features import Features
from solo.eval.knn import Vote, knn_accuracy, knn_hits, knn_scores


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_golden(golden, dtype, rtol):
    g = golden("solo_util_knn")
    train, test = g["train_features"].to(dtype), g["test_features"].to(dtype)
    for i, run in enumerate(g.params["runs"]):
        settings = dict(k=run["k"], temperature=run["T"] or 0.07, distance=run["distance"])
        scores = knn_scores(train, g["train_targets"], test, 5, **settings)
        torch.testing.assert_close(scores, g[f"scores_{i}"], rtol=rtol, atol=1e-12)
        voted = g[f"scores_{i}"] > 0  # the order among classes without a vote is arbitrary
        ranked = scores.argsort(dim=1, descending=True, stable=True)
        same = (ranked == g[f"ranking_{i}"]) | ~voted.gather(1, g[f"ranking_{i}"])
        assert same.all()
        accuracy = knn_accuracy(train, g["train_targets"], test, g["test_targets"], 5, **settings)
        assert [accuracy["acc1"], accuracy["acc5"]] == pytest.approx(g[f"acc_{i}"].tolist())


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_unigrads_knn(golden, dtype, rtol):
    g = golden("knn_small")
    bank, queries = g["bank"].double(), g["feature"].double()
    # The file's rows have norm 1 to float16 precision and are used as they are, ours are normalised: two more columns
    # give all rows one norm r without changing an inner product, so that a cosine is the inner product over r^2.
    squared = torch.cat([bank, queries]).square().sum(1).max()
    missing, zero = (lambda rows: (squared - rows.square().sum(1, keepdim=True)).sqrt()), (lambda rows: rows[:, :1] * 0)
    bank, queries = torch.cat([bank, missing(bank), zero(bank)], 1), torch.cat([queries, zero(queries), missing(queries)], 1)
    settings = dict(k=g.params["k"], temperature=g.params["temperature"] / squared.item())
    scores = knn_scores(bank.to(dtype), g["labels"].long(), queries.to(dtype), 5, **settings)
    assert (scores - g["scores"]).abs().max() <= rtol * g["scores"].max()
    assert torch.equal(scores.argmax(1), g["pred_top1"])


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    make = lambda n: Features(torch.randn(n, 6, generator=generator), torch.randint(4, (n,), generator=generator))  # noqa: E731
    return make(50), make(23)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_chunks_equal_whole(rows, distance):
    bank, queries = rows
    whole = knn_scores(*bank, queries.features, 4, k=7, distance=distance)
    for chunk in (1, 5, 23, 100):
        parts = knn_scores(*bank, queries.features, 4, k=7, distance=distance, chunk=chunk)
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=0)


def test_unlabelled_rows_neither_vote_nor_count(rows):
    bank, queries = rows
    bank.labels[::3] = -1
    queries.labels[::2] = -1
    kept, asked = bank.labels >= 0, queries.labels >= 0
    expected = knn_accuracy(bank.features[kept], bank.labels[kept], queries.features[asked], queries.labels[asked], 4, k=5)
    assert knn_accuracy(*bank, *queries, 4, k=5) == expected
    assert knn_hits(bank, queries, 4, [Vote(k=5)])[0, 2] == asked.sum()


def test_bank_without_labels_is_a_data_error(rows):
    bank, queries = rows
    with pytest.raises(DataError, match="none has a label"):
        knn_accuracy(bank.features, torch.full((50,), -1), *queries, 4, k=5)


def test_classes_are_those_of_the_dataset(rows):
    bank, queries = rows
    queries.labels.clamp_(max=1)  # the test split lacks two classes
    assert knn_scores(*bank, queries.features, 9, k=5).shape == (23, 9)
    assert knn_accuracy(*bank, *queries, 9, k=5)["acc5"] >= 0


def test_k_larger_than_the_bank_and_few_classes(rows):
    bank, queries = rows
    assert knn_accuracy(*bank, queries.features, queries.labels % 2, 4, k=10_000)["acc1"] >= 0


def test_low_temperature_stays_finite(rows):
    bank, _ = rows
    scores = knn_scores(*bank, bank.features, 4, k=5, temperature=0.01)
    assert scores.isfinite().all()
    assert (scores.argmax(1) == bank.labels).all()  # a row is its own nearest neighbour


def test_settings_share_a_search(rows):
    bank, queries = rows
    votes = [Vote(k=k, temperature=t, distance=d) for k in (1, 20) for t in (0.05, 0.5) for d in ("cosine", "euclidean")]
    together = knn_hits(bank, queries, 4, votes)
    for vote, row in zip(votes, together, strict=True):
        assert torch.equal(row, knn_hits(bank, queries, 4, [vote])[0])
