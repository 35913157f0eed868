"Evaluation against golden scores and against one scikit-learn call per query."
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reidbook import neighbors
from reidbook.evaluation import evaluate, evaluate_distances, plot_rank_lists, rank_lists
from reidbook.neighbors import re_rank

sys.path.insert(0, str(Path(__file__).parent))
import reference  # noqa: E402


@pytest.fixture(params=["numba", "no numba"])
def both_roads(request, monkeypatch):
    if request.param == "no numba":
        monkeypatch.setattr(neighbors, "numba", None)


def ids(g):
    return g["in_q_pids"], g["in_g_pids"], g["in_q_cams"], g["in_g_cams"]


def test_golden(golden, both_roads):
    g = golden("pplr_eval")
    for r in evaluate(g["in_q"], g["in_g"], *ids(g)), evaluate_distances(g["out_dist"], *ids(g)):
        assert r.mAP == pytest.approx(g["out_mAP"], abs=1e-6)
        np.testing.assert_allclose(r.ap, g["out_ap"], atol=1e-6)
        np.testing.assert_allclose(r.cmc, g["out_cmc"], atol=1e-9)
        assert r.rank(1) == r.cmc[0] and r.rank(10) == r.cmc[9]


def test_torch_and_numpy(golden):
    g = golden("pplr_eval")
    a, b = evaluate(g["in_q"], g["in_g"], *ids(g)), evaluate(torch.tensor(g["in_q"]), torch.tensor(g["in_g"]), *map(torch.tensor, ids(g)))
    assert a.mAP == b.mAP and "mAP" in a._repr_markdown_() and "64 of 64" in a._repr_markdown_()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 30), st.integers(1, 5), st.booleans(), st.booleans(), st.integers(0, 10**6))
def test_equals_one_scikit_learn_call_per_query(q, g, people, cams, with_cams, compiled, seed):
    "With many exact ties (small integers), few and many hits, with and without cameras, both roads."
    rng = np.random.default_rng(seed)
    xq, xg = rng.integers(-2, 3, (q, 3)).astype(np.float32), rng.integers(-2, 3, (g, 3)).astype(np.float32)
    args = [rng.integers(0, people, q), rng.integers(0, people, g)]
    args += [rng.integers(0, cams, q), rng.integers(0, cams, g)] if with_cams else []
    kept = neighbors.numba
    neighbors.numba = kept if compiled else None
    try:
        keep = (args[0][:, None] == args[1]) & ((args[2][:, None] != args[3]) if with_cams else True)
        if not keep.any():
            with pytest.raises(ValueError, match="none of the"):
                evaluate(xq, xg, *args)
            return
        got = evaluate(xq, xg, *args)
    finally:
        neighbors.numba = kept
    want = reference.evaluate(-((xq[:, None] - xg) ** 2).sum(-1), *args)
    np.testing.assert_allclose(got.ap, want["ap"], atol=1e-9)
    np.testing.assert_allclose(got.cmc, want["cmc"], atol=1e-9)
    assert got.mAP == pytest.approx(want["mAP"]) and got.mINP == pytest.approx(want["mINP"])


def test_many_hits_and_blocks():
    "More hits than the direct comparison takes, several blocks of queries."
    rng = np.random.default_rng(0)
    xq, xg = rng.normal(size=(333, 16)), rng.normal(size=(2000, 16))
    args = rng.integers(0, 12, 333), rng.integers(0, 12, 2000), rng.integers(0, 3, 333), rng.integers(0, 3, 2000)
    from reidbook import evaluation
    full = evaluate(xq, xg, *args)
    blocks = list(evaluation._similarity_blocks(*(neighbors.as_matrix(a) for a in (xq, xg)), "cpu", room=16 * 4 * 2000))
    assert len(blocks) == 21
    want = reference.evaluate(-((xq[:, None] - xg) ** 2).sum(-1), *args)
    np.testing.assert_allclose(full.ap, want["ap"], atol=1e-6)


@pytest.mark.parametrize("q, g, d", [(1, 5, 7), (7, 1001, 256), (40, 300, 2048), (200, 17, 64)])
def test_constant_features_score_nothing(q, g, d, both_roads):
    row = np.random.default_rng(0).normal(size=(1, d))
    row /= np.linalg.norm(row)
    pids = np.arange(g) % 5
    r = evaluate(np.repeat(row, q, 0), np.repeat(row, g, 0), np.arange(q) % 5, np.sort(pids))
    share = np.bincount(pids)[np.arange(q) % 5] / g
    np.testing.assert_allclose(r.ap, share)                   # one group of equal scores: precision = share of hits
    assert r.rank(1) == 0 and r.mINP == pytest.approx(share.mean())


def test_junk_and_queries_without_a_match():
    q, g = np.array([[1., 0], [1, 0], [1, 0]]), np.array([[1., 0], [.9, .436], [.8, .6]])
    r = evaluate(q, g, [0, 1, 2], [0, 0, 1], [0, 0, 0], [0, 1, 0])
    assert r.ap[0] == 1 and np.isnan(r.ap[1]) and np.isnan(r.ap[2]) and r.mAP == 1 and r.valid.tolist() == [True, False, False]
    with pytest.raises(ValueError, match="both or neither"):
        evaluate(q, g, [0, 1, 2], [0, 0, 1], [0, 0, 0])
    with pytest.raises(ValueError, match="g_pids"):
        evaluate(q, g, [0, 1, 2], [0, 0])
    with pytest.raises(ValueError, match="columns"):
        evaluate(q, g[:, :1], [0, 1, 2], [0, 0, 1])
    with pytest.raises(ValueError, match="NaN"):
        evaluate(q * np.nan, g, [0, 1, 2], [0, 0, 1])


def test_distractors_stay():
    "Identities that are never queried (0 in Market-1501) are wrong answers, not junk."
    q, g = np.array([[1., 0]]), np.array([[.99, .141], [.9, .436]])
    assert evaluate(q, g, [5], [0, 5], [1], [1 - 1, 0]).ap[0] == .5


def test_reranked_distances(golden):
    g = golden("pplr_eval")
    d = re_rank(g["in_q"], g["in_g"])
    want = reference.evaluate(-d, *ids(g))
    assert evaluate_distances(d, *ids(g)).mAP == pytest.approx(want["mAP"], abs=1e-6)


def test_rank_lists_leave_junk_out():
    g = np.array([[1., 0], [.9, .436], [.8, .6]])
    args = dict(q_pids=[3], g_pids=[3, 9, 3], q_cams=[0], g_cams=[0, 0, 1])
    assert rank_lists([[1., 0]], g, 3).tolist() == [[0, 1, 2]]
    assert rank_lists([[1., 0]], g, 3, **args).tolist() == [[1, 2, -1]]
    assert rank_lists(np.array([[0, 1.], [1, 0]]), g, 2, rows=[1]).tolist() == [[0, 1]]


def test_plot_rank_lists():
    import matplotlib
    matplotlib.use("Agg")
    images = [np.full((3, 8, 4), 40 * i, np.uint8) for i in range(4)]
    fig = plot_rank_lists(images[:1], images[1:], [[2, 0, -1]], [7], [9, 9, 7])
    colours = [matplotlib.colors.to_hex(ax.spines["left"].get_edgecolor()) for ax in fig.axes[1:3]]
    cycle = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
    assert colours == [matplotlib.colors.to_hex(c) for c in cycle[:2]]
    assert plot_rank_lists(images[:1], images[1:], [0, 1]).axes


def test_bench_runs(capsys):
    "The bench in small: engine and dense reference agree, numbers are there."
    from reidbook import bench
    row = bench.bench_clustering(400, 32)
    assert row["same_labels"] and row["ratio"] > 0 and row["peak_mb"] >= 0
