"Neighbours against the reference implementations' vectors and against the dense oracle of tests/reference.py."
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reidbook import neighbors
from reidbook.neighbors import jaccard_similarity, knn, list_agreement, neighbor_lists, re_rank

sys.path.insert(0, str(Path(__file__).parent))
import reference  # noqa: E402

quick = settings(max_examples=25, deadline=None, derandomize=True)


def features(n, dim, identities, noise, copies=0, seed=0):
    "Clustered unit rows; `copies` of them are exact copies of others."
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(identities, dim))[rng.integers(0, identities, n)] + noise * rng.normal(size=(n, dim))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    if copies:
        x[rng.integers(0, n, copies)] = x[rng.integers(0, n, copies)]
    return x


cases = st.builds(features, n=st.integers(2, 140), dim=st.integers(4, 24), identities=st.integers(1, 12), noise=st.floats(.2, 1.5),
                  copies=st.sampled_from([0, 0, 5, 60]), seed=st.integers(0, 10**6))


@pytest.fixture(params=["numba", "no numba"])
def both_roads(request, monkeypatch):
    if request.param == "no numba":
        monkeypatch.setattr(neighbors, "numba", None)


# -- golden ---------------------------------------------------------------------------------------------------------------------
def test_golden_jaccard(golden, both_roads):
    g = golden("pplr_jaccard")
    sims, idx = knn(g["in_features"], 30)
    assert (idx == g["out_initial_rank"]).all()
    np.testing.assert_allclose(2 - 2 * sims, g["out_initial_d"], atol=2e-6)
    np.testing.assert_allclose(1 - jaccard_similarity(g["in_features"]).toarray(), g["out_dist"], atol=1e-6)


def test_golden_jaccards_of_the_other_methods(golden, both_roads):
    g = golden("engine_extra")
    close = lambda x, k1, k2, want, step: np.testing.assert_allclose(1 - jaccard_similarity(x, k1, k2).toarray()[::step], want, atol=1e-6)
    for k1, k2 in (30, 6), (20, 6), (8, 1):
        close(g["pass_jac_in"], k1, k2, g[f"pass_jac_k1_{k1}_k2_{k2}"], 4)
    close(g["mprd_features"], 10, 4, g["mprd_jaccard"], 1)
    close(g["icsr_features"], 30, 6, g["icsr_s2_jaccard"], 6)
    for cam in 1, 2, 3, 4:
        close(g["icsr_features"][g["icsr_cams"] == cam], 30, 6, g[f"icsr_s1_jaccard_cam{cam}"], 1)


def test_golden_purification(golden):
    g = golden("engine_extra")
    d = {}
    for head, name in zip("gud", ("jac_g", "jac_u", "jac_d")):
        d[head] = 1 - jaccard_similarity(g[f"purification_feat_{head}"]).toarray()
        np.testing.assert_allclose(d[head][::6], g[f"purification_{name}"], atol=1e-6)
    np.testing.assert_allclose((.7 * d["g"] + .15 * d["u"] + .15 * d["d"])[::6], g["purification_jac_fused"], atol=1e-6)


def test_golden_lists_and_agreement(golden):
    g = golden("pplr_ranked")
    for option in 0, 2, 3:
        assert (neighbor_lists(g["in_features"], 20, compat=True) == g[f"out_ranked_opt{option}"]).all()
    assert (neighbor_lists(g["in_features"], 20) == g["out_ranked_opt0"]).all()       # no copies here: both rules agree
    for name, want in ("pplr_agreement", "out_score"), ("pplr_epoch", "out_score_all"):
        g = golden(name)
        whole = neighbor_lists(g["in_features_g"], 20)
        for p in range(3):
            np.testing.assert_allclose(list_agreement(whole, neighbor_lists(g["in_features_p"][:, :, p], 20)), g[want][:, p], atol=1e-6)


def test_golden_rerank(golden, both_roads):
    x, g = golden("pplr_jaccard")["in_features"], golden("pplr_rerank")
    np.testing.assert_allclose(2 - 2 * x[:64] @ x[64:].T, g["in_qg"], atol=1e-5)      # the distances there are of these features
    np.testing.assert_allclose(re_rank(x[:64], x[64:]), g["out_dist"], atol=1e-5)
    np.testing.assert_allclose(reference.rerank(g["in_qg"], g["in_qq"], g["in_gg"]), g["out_dist"], atol=1e-6)


# -- properties -----------------------------------------------------------------------------------------------------------------
@quick
@given(cases, st.integers(1, 40))
def test_knn_equals_the_oracle(x, k):
    sims, idx = knn(x, k)
    rank, want = reference.ranks(x, k)
    assert sims.shape == idx.shape == (len(x), min(k, len(x)))
    np.testing.assert_allclose(sims, want, atol=1e-6)
    assert (idx == rank).all()


@quick
@given(cases, st.integers(1, 35), st.integers(1, 8))
def test_jaccard_equals_the_oracle(x, k1, k2):
    got, want = jaccard_similarity(x, k1, k2), 1 - reference.jaccard_distance(x, k1, k2)
    np.testing.assert_allclose(got.toarray(), want, atol=2e-6)
    assert abs(got - got.T).max() == 0 and got.has_sorted_indices and got.dtype == np.float32


@quick
@given(cases, st.integers(1, 20), st.integers(1, 6))
def test_without_numba(x, k1, k2):
    fast = jaccard_similarity(x, k1, k2).toarray()
    kept, neighbors.numba = neighbors.numba, None
    try:
        slow = jaccard_similarity(x, k1, k2).toarray()
        pruned = jaccard_similarity(x, k1, k2, min_similarity=.4).toarray()
    finally:
        neighbors.numba = kept
    np.testing.assert_allclose(slow, fast, atol=1e-6)
    np.testing.assert_allclose(pruned, np.where(slow >= np.float32(.4), slow, 0), atol=1e-6)


@quick
@given(cases, st.integers(0, 1000))
def test_order_of_the_images_does_not_matter(x, seed):
    x = np.unique(x, axis=0)                                  # copies are told apart by their index, on purpose
    order = np.random.default_rng(seed).permutation(len(x))
    np.testing.assert_allclose(jaccard_similarity(x[order]).toarray(), jaccard_similarity(x).toarray()[np.ix_(order, order)], atol=2e-6)


@quick
@given(cases, st.integers(1, 12), st.integers(1, 4), st.floats(0, 1))
def test_rerank_equals_the_oracle(x, k1, k2, mix):
    q = max(1, len(x) // 4)
    if len(np.unique(x, axis=0)) < len(x):
        return                                                # the dense rounding of equal distances is not ours
    d = np.maximum(((x[:, None].astype(float) - x[None]) ** 2).sum(-1), 0)
    want = reference.rerank(d[:q, q:], d[:q, :q], d[q:, q:], min(k1, len(x) - 1), k2, mix)
    np.testing.assert_allclose(re_rank(x[:q], x[q:], k1, k2, mix), want, atol=2e-5)


def test_blocks_of_all_shapes():
    x = features(700, 16, 20, .6, copies=90)
    rank, _ = reference.ranks(x, 25)
    first, kind = neighbors._distinct(x)
    for block in 33, 256, 699, 4096:
        s, i = neighbors._half_search(x, 25, rows=first, block=block)
        assert (neighbors._unfold(s, i, first, kind, 25)[1] == rank).all()
        s, i = neighbors._full_search(x, 25, rows=first)
        assert (neighbors._unfold(s, i, first, kind, 25)[1] == rank).all()


def test_one_and_two_threads_agree_bit_by_bit():
    x = features(900, 128, 60, 1.0)
    results = []
    for threads in 1, 2:
        torch.set_num_threads(threads)
        results.append((*knn(x, 30), jaccard_similarity(x), re_rank(x[:100], x[100:])))
    torch.set_num_threads(1)
    (s1, i1, j1, r1), (s2, i2, j2, r2) = results
    assert np.array_equal(s1, s2) and np.array_equal(i1, i2) and (j1 != j2).nnz == 0 and np.array_equal(r1, r2)


def test_rows_of_any_length_rank_by_distance():
    x = features(300, 12, 20, .7) * np.random.default_rng(0).uniform(.5, 2, (300, 1)).astype(np.float32)
    d = ((x[:, None].astype(float) - x[None]) ** 2).sum(-1)
    rank = np.argsort(d, axis=1, kind="stable")[:, :20]
    want = reference.jaccard_distance(x, 20, 6, rank=rank)
    np.testing.assert_allclose(1 - jaccard_similarity(x, 20, 6).toarray(), want, atol=5e-6)


# -- copies, small sets, types ----------------------------------------------------------------------------------------------------
def test_more_copies_than_places():
    x = np.repeat(features(2, 8, 2, .5), [40, 10], axis=0)
    idx = knn(x, 12)[1]
    assert (idx[:40] == np.arange(12)).all()                  # ties by lower index: self may be missing
    lists = neighbor_lists(x, 12)
    assert lists.shape == (50, 12) and (lists != np.arange(50)[:, None]).all()
    j = jaccard_similarity(x, 12, 6).toarray()
    np.testing.assert_allclose(j[:40, :40], 1, atol=1e-6)     # copies are one picture


def test_compat_drops_by_position():
    x = np.repeat(features(5, 8, 5, .5), 3, axis=0)
    shipped = neighbor_lists(x, 4, compat=True)
    assert (shipped == np.arange(15)[:, None]).any()          # an image in its own list, its twin dropped
    assert not (neighbor_lists(x, 4) == np.arange(15)[:, None]).any()


def test_small_sets():
    x = features(6, 8, 2, .3)
    assert knn(x, 30)[1].shape == (6, 6) and (knn(x, 30)[1] >= 0).all()
    assert knn(x[:1], 5)[1].tolist() == [[0]] and neighbor_lists(x[:1], 5).shape == (1, 0)
    assert jaccard_similarity(x[:1]).toarray() == pytest.approx(1)
    np.testing.assert_allclose(1 - jaccard_similarity(x).toarray(), reference.jaccard_distance(x), atol=1e-6)


def test_types():
    x = features(50, 16, 5, .5)
    s, i = knn(x, 5)
    for same in torch.tensor(x), x.astype(np.float64), np.asfortranarray(x), torch.tensor(x, requires_grad=True):
        assert np.array_equal(knn(same, 5)[1], i)
    half = knn(torch.tensor(x).half(), 5)
    assert half[0].dtype == np.float32 and half[1].dtype == np.int64
    assert isinstance(s, np.ndarray) and (np.diff(s, axis=1) <= 0).all()


def test_known_lists_are_used():
    x = features(200, 16, 20, .5)
    assert (jaccard_similarity(x, 20, neighbors=knn(x, 25)) != jaccard_similarity(x, 20)).nnz == 0


def test_full_precision_whatever_the_setting():
    x = features(400, 64, 30, .8)
    want = knn(x, 20)
    torch.set_float32_matmul_precision("medium")
    got = knn(x, 20)
    assert torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision("highest")
    assert np.array_equal(got[0], want[0]) and np.array_equal(got[1], want[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_rows_are_named(bad):
    x = features(30, 8, 3, .5)
    x[[4, 17], 2] = bad
    for call in (lambda: knn(x, 3), lambda: jaccard_similarity(x), lambda: re_rank(x[:5], x)):
        with pytest.raises(ValueError, match="rows? .*4"):
            call()
    with pytest.raises(ValueError, match="17"):
        knn(x, 3)


def test_other_errors():
    x = features(30, 8, 3, .5)
    for call, words in ((lambda: knn(x, 0), "k: found 0"), (lambda: knn(x[0], 3), "N x D"), (lambda: knn(x[:0], 3), "at least one row"),
                        (lambda: jaccard_similarity(x, k2=0), "k2: found 0"), (lambda: re_rank(x, x[:, :4]), "columns"),
                        (lambda: list_agreement([[1]], [[1], [2]]), "same N")):
        with pytest.raises(ValueError, match=words):
            call()


def test_huge_finite_values_are_not_called_broken():
    "They cannot be multiplied either, and the error says that."
    with pytest.raises(ValueError, match="longer than 4e18"): knn(3e38 * np.eye(3, 4), 2)
    assert knn(1e18 * np.eye(3, 4), 2)[1].shape == (3, 2)


def test_agreement():
    rng = np.random.default_rng(0)
    a, b = (np.stack([rng.permutation(60)[:20] for _ in range(80)]) for _ in range(2))
    want = [len(set(p) & set(q)) / len(set(p) | set(q)) for p, q in zip(a.tolist(), b.tolist())]
    np.testing.assert_allclose(list_agreement(a, b), want, rtol=1e-6)
    assert (list_agreement(a, a) == 1).all()


def test_approximate_says_how_good_it_is(capsys):
    pytest.importorskip("faiss")
    x = features(1500, 16, 60, .6)
    _, idx = neighbors.knn_approximate(x, 10, cells=30, probes=30)
    assert "recall@10 1.000" in capsys.readouterr().out       # all cells searched: exact
    _, idx = neighbors.knn_approximate(x, 10, cells=60, probes=1)
    assert (idx >= 0).all() and 0.2 < neighbors.recall_on_sample(x, idx) < 1
    assert neighbors.recall_on_sample(x, knn(x, 10)[1]) == 1


def test_works_when_torchs_default_dtype_is_float64():
    from reidbook import evaluation, memory
    x, pids = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32), np.arange(200) % 20
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    calls = (lambda: neighbors.as_matrix(torch.tensor(x)), lambda: neighbors.knn(x, 5)[1], lambda: neighbors.jaccard_similarity(x).toarray(),
             lambda: neighbors.re_rank(x[:70], x[70:]), lambda: evaluation.evaluate(x[:70], x[70:], pids[:70], pids[70:]).ap,
             lambda: evaluation.rank_lists(x[:70], x[70:]), lambda: memory.prototypes(x, pids),
             lambda: memory.HybridMemory(x, pids)(torch.from_numpy(x[:4]), torch.arange(4)).numpy())
    want = [call() for call in calls]
    torch.set_default_dtype(torch.float64)
    try: got = [call() for call in calls]
    finally: torch.set_default_dtype(torch.float32)
    for a, b in zip(got, want): assert np.array_equal(a, b) and a.dtype == b.dtype
