"Clustering against golden labels and against scikit-learn on dense matrices."
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score

from reidbook import clustering
from reidbook.clustering import agglomerative, dbscan, infomap, infomap_links, min_similarity
from reidbook.neighbors import jaccard_similarity, knn

sys.path.insert(0, str(Path(__file__).parent))
import reference  # noqa: E402
from test_neighbors import cases, features  # noqa: E402

quick = settings(max_examples=25, deadline=None, derandomize=True)


def test_golden_pseudo_labels(golden):
    for name in "pplr_pseudo", "pplr_epoch":
        g = golden(name)
        x = g.get("in_features", g.get("in_features_g"))
        labels, want = dbscan(jaccard_similarity(x, min_similarity=min_similarity(.5)), .5), g["out_labels"].copy()
        want[want >= g["out_num_class"]] = -1                 # there outliers are numbered upwards
        if name == "pplr_epoch":
            assert (np.flatnonzero(labels >= 0) == g["out_keep"]).all() and (labels[labels >= 0] == g["out_pids"]).all()
        else:
            assert (labels == want).all()


def test_golden_mprd_and_purification(golden):
    g = golden("engine_extra")
    assert (dbscan(jaccard_similarity(g["mprd_features"], 10, 4), .6) == g["mprd_dbscan"]).all()
    j = [jaccard_similarity(g[f"purification_feat_{h}"]) for h in "gud"]
    assert (dbscan(.7 * j[0] + .15 * j[1] + .15 * j[2], .6) == g["purification_labels"]).all()
    assert (dbscan(j[0], .6) != g["purification_labels_global_only"]).sum() == 1      # the one pair within 1e-5 of eps
    assert (dbscan(j[0], .6 - 1e-5) == g["purification_labels_global_only"]).all()    # strictly at eps: none


def test_golden_icsr(golden):
    g = golden("engine_extra")
    x, cams = g["icsr_features"], g["icsr_cams"]
    j = jaccard_similarity(x)
    assert (dbscan(j, .5) == g["icsr_s2_dbscan_labels"]).all()
    assert adjusted_rand_score(agglomerative(j, g["icsr_s2_ac_labels"].max() + 1), g["icsr_s2_ac_labels"]) == 1
    for cam in 1, 2, 3, 4:
        want = g[f"icsr_s1_labels_cam{cam}"]
        assert (agglomerative(1 - g[f"icsr_s1_jaccard_cam{cam}"], want.max() + 1) == want).all()      # numbers too
        own = agglomerative(jaccard_similarity(x[cams == cam]), want.max() + 1)
        assert adjusted_rand_score(own, want) == 1


def test_golden_infomap_graph(golden):
    g = golden("engine_extra")
    sims, idx = knn(g["icsr_features"], 15)
    assert (idx == g["icsr_s2_knn_idx"]).all()
    np.testing.assert_allclose(1 - sims, g["icsr_s2_knn_dist"], atol=2e-6)
    row, col, weight = infomap_links(sims, idx)
    assert (np.stack([row, col], 1) == g["icsr_s2_links"][:, :2]).all()
    np.testing.assert_allclose(weight, g["icsr_s2_links"][:, 2], atol=1e-6)


def test_infomap(golden):
    if not importlib.util.find_spec("infomap"): pytest.skip("infomap is not installed")  # not loaded here: faiss goes first
    g = golden("engine_extra")
    labels = infomap(g["icsr_features"])
    assert adjusted_rand_score(labels, g["icsr_s2_infomap_labels"]) > .95             # Infomap depends on its version
    assert (labels == infomap(g["icsr_features"])).all()
    kept = labels[labels >= 0]
    assert np.bincount(kept).min() >= 5 and set(kept) == set(range(kept.max() + 1))
    assert (infomap(g["icsr_features"], min_similarity=1.1) == -1).all()


def test_infomap_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "infomap", None)
    with pytest.raises(ValueError, match="pip install infomap"):
        infomap(np.eye(4))


@quick
@given(cases, st.integers(1, 35), st.integers(1, 8), st.sampled_from([.3, .4, .5, .6, .7]), st.integers(1, 6), st.integers(0, 99))
def test_labels_equal_the_dense_oracle(x, k1, k2, eps, min_samples, seed):
    "Any N, k1, k2, eps, with copies, in any order of the images."
    for order in np.arange(len(x)), np.random.default_rng(seed).permutation(len(x)):
        want = reference.dbscan(reference.jaccard_distance(x[order], k1, k2), eps, min_samples)
        full = dbscan(jaccard_similarity(x[order], k1, k2), eps, min_samples)
        pruned = dbscan(jaccard_similarity(x[order], k1, k2, min_similarity=min_similarity(eps)), eps, min_samples)
        assert (full == want).all() and (pruned == want).all()


@quick
@given(st.integers(1, 60), st.floats(.05, .95), st.integers(1, 8), st.integers(0, 10**6))
def test_dbscan_equals_scikit_learn(n, eps, min_samples, seed):
    "On any symmetric matrix, dense or sparse, numbers and border images included."
    rng = np.random.default_rng(seed)
    d = np.triu(rng.choice([.1, .2, .5, .8, 1.0, eps], (n, n)), 1)
    d += d.T
    want = reference.dbscan(d, eps, min_samples)
    s = 1 - d
    assert (dbscan(s, eps, min_samples) == want).all()
    np.fill_diagonal(s, 0)                                    # an absent diagonal changes nothing
    assert (dbscan(sp.csr_matrix(s), eps, min_samples) == want).all()


def test_tie_rule():
    "Four of six shared neighbours is a distance of exactly one half; the order of the files must not matter."
    rng = np.random.default_rng(0)
    pids = rng.integers(0, 200, 600)
    x = rng.normal(size=(200, 512))[pids] + 2 * rng.normal(size=(600, 512))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    j = jaccard_similarity(x, 15)
    d = 1 - j.data.astype(float)
    assert (np.abs(d - .5) < 1e-6).sum() > 20                 # there are ties at eps
    labels = dbscan(j, .5)
    assert (labels == reference.dbscan(reference.jaccard_distance(x, 15), .5)).all()
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(600)
        back = np.empty(600, int)
        back[order] = dbscan(jaccard_similarity(x[order], 15), .5)
        assert adjusted_rand_score(labels, back) == 1


def test_edges_of_eps():
    assert (dbscan(np.zeros((5, 5)), 1.0) == 0).all() and (dbscan(np.zeros((3, 3)), 1.0) == -1).all()
    assert (dbscan(np.zeros((5, 5)), .9) == -1).all()
    assert (dbscan(np.eye(5), .5, min_samples=1) == np.arange(5)).all()
    assert min_similarity(.6) == pytest.approx(.4, abs=2e-5) and min_similarity(1.2) == 0


@quick
@given(st.integers(2, 40), st.integers(0, 10**6), st.data())
def test_agglomerative_equals_scikit_learn(n, seed, data):
    d = np.triu(np.random.default_rng(seed).random((n, n)), 1)
    d += d.T
    k = data.draw(st.integers(1, n))
    want = AgglomerativeClustering(k, metric="precomputed", linkage="average").fit_predict(d)
    assert (agglomerative(1 - d, k) == want).all() and (agglomerative(sp.csr_matrix(1 - d), k) == want).all()


def test_agglomerative_refuses_what_does_not_fit(monkeypatch):
    with pytest.raises(ValueError, match=r"3,000,000 images need about .* GB"):
        agglomerative(sp.identity(3_000_000, format="csr"), 10)
    monkeypatch.setattr(clustering, "_free_memory", lambda: 100.0)
    with pytest.raises(ValueError, match="dbscan or infomap"):
        agglomerative(np.eye(20), 2)
    with pytest.raises(ValueError, match="1 to 20"):
        agglomerative(np.eye(20), 21)
    assert agglomerative(np.eye(1), 1).tolist() == [0]


def test_not_square():
    with pytest.raises(ValueError, match="N x N"):
        dbscan(np.zeros((3, 4)), .5)


def test_identities_are_found():
    x = features(400, 64, 20, .3)
    labels = dbscan(jaccard_similarity(x, 20, min_similarity=min_similarity(.6)), .6)
    assert labels.dtype == np.int64 and labels.max() == 19 and (labels >= 0).mean() > .95


INFOMAP = """
import sys
sys.path.append({stubs!r})  # an empty faiss, where none is installed
import numpy as np
from reidbook import neighbors
from reidbook.clustering import infomap
{first}
x = np.eye(6, dtype=np.float32)[np.arange(60) % 6]
labels = infomap(x)
import faiss
assert np.array_equal(labels, infomap(x)) and labels.max() == 5
names = list(sys.modules)
assert names.index("faiss") < names.index("infomap"), "infomap was loaded first"
"""


@pytest.mark.parametrize("first", ["", "neighbors.numba = None"])
def test_infomap_loads_faiss_first(tmp_path, first):
    "The other order ends the process inside modules()."
    if not importlib.util.find_spec("infomap"): pytest.skip("infomap is not installed")
    (tmp_path / "faiss.py").write_text("")
    code = INFOMAP.format(stubs=str(tmp_path), first=first)
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
