"Thresholds, open sets and galleries: loops and scikit-learn as oracles, bad input, files."
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_curve

from reidbook.evaluation import unit_rows
from reidbook.open_set import (equal_error, fnmr_at_fmr, Gallery, load_gallery, open_set, pair_scores, save_gallery, threshold_at,
                               threshold_from_clusters)

quick = settings(max_examples=60, deadline=None, derandomize=True)
scores = st.lists(st.sampled_from(np.round(np.linspace(-1, 1, 21), 1).tolist()), min_size=1, max_size=30)  # many ties


@quick
@given(scores, st.sampled_from([0, .01, .1, .25, .5, 1]))
def test_threshold_is_the_smallest_that_keeps_the_rate(impostor, rate):
    x, at = np.array(impostor), threshold_at(impostor, rate)
    assert np.mean(x >= at) <= rate + 1e-12
    below = [t for t in np.unique(x) if t < at]
    assert not below or np.mean(x >= below[-1]) > rate


@quick
@given(scores, scores)
def test_equal_error_against_all_thresholds(genuine, impostor):
    g, i = np.array(genuine), np.array(impostor)
    rate, at = equal_error(g, i)
    gaps = {t: (abs(np.mean(g < t) - np.mean(i >= t)), (np.mean(g < t) + np.mean(i >= t)) / 2) for t in np.unique(np.r_[g, i])}
    assert gaps[at][0] == pytest.approx(min(gap for gap, _ in gaps.values())) and rate == pytest.approx(gaps[at][1])


def test_errors_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    genuine, impostor = rng.normal(1, 1, 500), rng.normal(0, 1, 4000)
    fmr, tmr, _ = roc_curve(np.r_[np.ones(500), np.zeros(4000)], np.r_[genuine, impostor], drop_intermediate=False)
    for rate in .001, .01, .1: assert fnmr_at_fmr(genuine, impostor, rate) == pytest.approx(1 - tmr[fmr <= rate].max())
    crossing = np.abs(1 - tmr - fmr).argmin()
    assert equal_error(genuine, impostor)[0] == pytest.approx((1 - tmr + fmr)[crossing] / 2, abs=1e-3)


def scene(seed=0, people=6, unknown=3):
    rng = np.random.default_rng(seed)
    middle = rng.normal(size=(people + unknown, 8))
    g_pids, q_pids = np.repeat(np.arange(people), 4), np.repeat(np.arange(people + unknown), 2)
    noisy = lambda pids: middle[pids] + .8 * rng.normal(size=(len(pids), 8))
    return noisy(q_pids), noisy(g_pids), q_pids, g_pids, rng.integers(0, 3, len(q_pids)), rng.integers(0, 3, len(g_pids))


@pytest.mark.parametrize("with_cams", [False, True])
def test_pairs_and_best_matches_against_a_loop(with_cams):
    q, g, qp, gp, qc, gc = scene()
    cams = (qc, gc) if with_cams else ()
    genuine, impostor, known, right, unknown = [], [], [], [], []
    for i in range(len(q)):
        best, there = (-2, None), False
        for j in range(len(g)):
            if with_cams and qp[i] == gp[j] and qc[i] == gc[j]: continue
            s = q[i] @ g[j] / np.linalg.norm(q[i]) / np.linalg.norm(g[j])
            (genuine if qp[i] == gp[j] else impostor).append(s)
            best, there = max(best, (s, j)), there or qp[i] == gp[j]
        (known if there else unknown).append(best[0])
        if there: right.append(qp[i] == gp[best[1]])
    got = pair_scores(q, g, qp, gp, *cams)
    np.testing.assert_allclose(np.sort(got[0]), np.sort(genuine), atol=1e-6)
    np.testing.assert_allclose(np.sort(got[1]), np.sort(impostor), atol=1e-6)
    found = open_set(q, g, qp, gp, *cams)
    np.testing.assert_allclose(found.known, known, atol=1e-6)
    np.testing.assert_allclose(found.unknown, unknown, atol=1e-6)
    assert found.right.tolist() == right
    for far in 0, .2, .5, 1:
        at = threshold_at(unknown, far)
        assert found.dir_at_far(far) == pytest.approx(np.mean([r and s >= at - 1e-6 for r, s in zip(right, known)]))


def test_threshold_from_clusters_is_that_of_their_pairs():
    q, g, qp, gp, qc, gc = scene(1)
    labels = np.where(np.arange(len(gp)) % 5 == 0, -1, gp)
    kept, x = labels >= 0, unit_rows(g.astype(np.float32))
    for cams in (None, gc):
        apart = [x[i] @ x[j] for i in np.flatnonzero(kept) for j in np.flatnonzero(kept)
                 if i < j and labels[i] != labels[j] and (cams is None or cams[i] != cams[j])]
        assert threshold_from_clusters(g, labels, .1, cams) == pytest.approx(threshold_at(apart, .1), abs=1e-6)


def test_refused():
    q, g, qp, gp, *_ = scene()
    with pytest.raises(ValueError, match="rate"): threshold_at([1.], 1.5)
    with pytest.raises(ValueError, match="impostor: found 0"): threshold_at([], .1)
    with pytest.raises(ValueError, match="genuine"): fnmr_at_fmr([np.nan], [1.])
    with pytest.raises(ValueError, match="use one model"): pair_scores(q[:, :3], g, qp, gp)
    with pytest.raises(ValueError, match="g_pids"): pair_scores(q, g, qp, gp[:3])
    with pytest.raises(ValueError, match="an open set needs both"): open_set(q[qp < 6], g, qp[qp < 6], gp)
    with pytest.raises(ValueError, match="fewer than two clusters"): threshold_from_clusters(g, np.zeros(len(g)))
    with pytest.raises(ValueError, match="NaN"): pair_scores(np.full((2, 8), np.nan), g, [1, 2], gp)


# -- gallery --------------------------------------------------------------------------------------------------------------------
def test_an_empty_gallery_knows_nobody(tmp_path):
    people = Gallery(.5)
    assert people.match(np.eye(2)) == ([None, None], pytest.approx([-1, -1]))
    save_gallery(people, tmp_path / "empty.npz")
    assert len(load_gallery(tmp_path / "empty.npz").names) == 0


def test_gallery_refuses_and_names():
    people = Gallery(.5)
    people.add(np.eye(3), ["a", "b", "c"])
    with pytest.raises(ValueError, match="expected one for each"): people.add(np.eye(3), ["d"])
    with pytest.raises(ValueError, match="use one model"): people.add(np.eye(2), "d")
    with pytest.raises(ValueError, match="use one model"): people.match(np.eye(2))
    with pytest.raises(ValueError, match="not in the gallery"): people.merge("a", "z")
    with pytest.raises(ValueError, match="threshold"): Gallery(2)
    assert people.names.tolist() == ["a", "b", "c"] and len(people.features) == 3


def test_a_file_that_is_no_gallery(tmp_path):
    (tmp_path / "text.npz").write_text("no")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.savez(tmp_path / "pickle.npz", threshold=.5, features=np.eye(2), names=np.array([{}, {}], object))
    for name in "text", "other", "pickle":
        with pytest.raises(ValueError, match="is no gallery"): load_gallery(tmp_path / f"{name}.npz")
    with pytest.raises(FileNotFoundError): load_gallery(tmp_path / "none.npz")
