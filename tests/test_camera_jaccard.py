"CA-Jaccard: golden vectors of the released code, and a dense oracle written from the paper's steps."
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reidbook import neighbors
from reidbook.clustering import dbscan, min_similarity
from reidbook.neighbors import camera_jaccard, camera_re_rank, jaccard_similarity, re_rank

quick = settings(max_examples=30, deadline=None, derandomize=True)


@pytest.fixture(params=["numba", "no numba"])
def both_roads(request, monkeypatch):
    if request.param == "no numba": monkeypatch.setattr(neighbors, "numba", None)


def expanded(x, cams, k2, compat=False):
    lists = neighbors._camera_lists(x, np.unique(cams, return_inverse=True)[1], (5, 20), k2, compat=compat)
    return neighbors._camera_encode(lists, (5, 20), k2, lambda rows, cols, dots: 2 * dots - 2)


# -- golden ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["next_ca_jaccard", "next_ca_jaccard_small"])
@pytest.mark.parametrize("epoch, k2", [(0, (3, 3)), (1, (2, 4))])
def test_golden(golden, both_roads, name, epoch, k2):
    g = golden(name)
    x, cams, compat = g["in_features"], g["in_cams"], name.endswith("small")
    v = expanded(x, cams, k2, compat)
    assert (v.indptr == g[f"out_v_e{epoch}_indptr"]).all() and (v.indices == g[f"out_v_e{epoch}_indices"]).all()
    np.testing.assert_allclose(v.data, g[f"out_v_e{epoch}_data"], atol=1e-6)
    graph = camera_jaccard(x, cams, k2=k2, compat=compat)
    np.testing.assert_allclose(1 - graph.toarray(), g[f"out_dist_e{epoch}"], atol=3e-6)
    for eps in .4, .6:
        want = g[f"out_labels_e{epoch}_eps{int(10 * eps):02}"]
        assert (dbscan(graph, eps) == want).all()
        assert (dbscan(camera_jaccard(x, cams, k2=k2, compat=compat, min_similarity=min_similarity(eps)), eps) == want).all()


def test_golden_other_lists(golden, both_roads):
    g = golden("next_ca_jaccard")
    np.testing.assert_allclose(1 - camera_jaccard(g["in_features"], g["in_cams"], (3, 8), (2, 2)).toarray(), g["out_dist_k38_22"], atol=3e-6)


def test_golden_meant(golden, both_roads):
    "A list ends where its camera ends."
    g = golden("next_ca_jaccard_small")
    for epoch, k2 in (0, (3, 3)), (1, (2, 4)):
        got = 1 - camera_jaccard(g["in_features"], g["in_cams"], k2=k2).toarray()
        np.testing.assert_allclose(got[g["out_meant_rows"]], g[f"out_meant_dist_e{epoch}"], atol=3e-6)
        assert np.abs(got - g[f"out_dist_e{epoch}"]).max() > 1e-3


def test_golden_cameras_that_run_over(golden, both_roads):
    g = golden("next_ca_jaccard_small")
    for name in "one", "two":
        got = camera_jaccard(g[f"in_{name}_features"], g[f"in_{name}_cams"], compat=True)
        np.testing.assert_allclose(1 - got.toarray(), g[f"out_{name}_dist"], atol=3e-6)


def test_golden_plain_of_the_same_file(golden):
    "Lists of 31 columns, where the SpCL version has 30."
    g = golden("next_ca_jaccard")
    sims, rank = neighbors.knn(g["in_features"], 31)
    v = neighbors._encode(g["in_features"], rank, sims, 16, lambda rows, cols, dots: 2 * dots - 2)
    got = neighbors._overlap(neighbors._expand_query(v, rank, 6), 0.0)
    np.testing.assert_allclose(1 - got.toarray(), g["out_dist_plain"], atol=3e-6)


def test_golden_rerank(golden, both_roads):
    g = golden("next_ca_rerank")
    words = g["in_query"], g["in_gallery"], g["in_q_cams"], g["in_g_cams"]
    for k2 in (3, 3), (2, 4):
        np.testing.assert_allclose(camera_re_rank(*words, k2=k2), g[f"out_dist_{k2[0]}{k2[1]}"], atol=3e-6)


# -- the oracle -------------------------------------------------------------------------------------------------------------------
def oracle(x, cams, k1, k2):
    "Distance, one image at a time, N x N, in float64; nothing shared with the engine."
    x = np.asarray(x, np.float64)
    n = len(x)
    s = np.stack([(x * row).sum(1) for row in x])
    d = 2 - 2 * s
    order = [sorted(range(n), key=lambda j: (j != i, -s[i, j], j)) for i in range(n)]
    own = [[j for j in order[i] if cams[j] == cams[i]] for i in range(n)]
    far = [[j for j in order[i] if cams[j] != cams[i]] for i in range(n)]
    v = np.zeros((n, n))
    for i in range(n):
        for lists, k in ((own, k1[0] + 1), (far, k1[1] + 1)):
            for j in lists[i][:k]:
                if i in lists[j][:k]: v[i, j] = np.exp(-d[i, j])
        v[i] /= v[i].sum()
    mixed = np.stack([v[own[i][:k2[0]] + far[i][:k2[1]]].mean(0) for i in range(n)])
    m = np.stack([np.minimum(row, mixed).sum(1) for row in mixed])
    return np.maximum(1 - m / (2 - m), 0)


def scene(n, cameras, copies, seed, sizes="even"):
    "Unit rows with cameras: even, or most of them tiny; some rows copied into any camera."
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(6, 12))[rng.integers(0, 6, n)] + .6 * rng.normal(size=(n, 12))
    if copies: x[rng.integers(0, n, copies)] = x[rng.integers(0, n, copies)]
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    cams = rng.integers(0, cameras, n) if sizes == "even" else np.where(rng.random(n) < .85, 0, rng.integers(1, cameras + 1, n))
    cams[:2] = 0, 1  # at least two
    return x, 7 * cams - 3


scenes = st.builds(scene, n=st.integers(3, 90), cameras=st.integers(2, 6), copies=st.sampled_from([0, 0, 4, 40]), seed=st.integers(0, 10**6),
                   sizes=st.sampled_from(["even", "tiny"]))
lists = st.tuples(st.integers(1, 8), st.integers(1, 12))
heads = st.tuples(st.integers(1, 4), st.integers(1, 5))


@quick
@given(scenes, lists, heads)
def test_equals_the_oracle(case, k1, k2):
    got = camera_jaccard(*case, k1, k2)
    np.testing.assert_allclose(1 - got.toarray(), oracle(*case, k1, k2), atol=3e-6)
    assert abs(got - got.T).max() == 0 and got.has_sorted_indices and got.dtype == np.float32


@quick
@given(scenes, lists, heads)
def test_without_numba(case, k1, k2):
    fast = camera_jaccard(*case, k1, k2).toarray()
    kept, neighbors.numba = neighbors.numba, None
    try: slow = camera_jaccard(*case, k1, k2).toarray()
    finally: neighbors.numba = kept
    np.testing.assert_allclose(slow, fast, atol=1e-6)


@quick
@given(scenes, st.floats(.05, .9))
def test_small_entries_may_be_left_out(case, least):
    whole, some = camera_jaccard(*case).toarray(), camera_jaccard(*case, min_similarity=least).toarray()
    np.testing.assert_allclose(some, np.where(whole >= np.float32(least), whole, 0), atol=1e-6)


@quick
@given(st.builds(scene, n=st.integers(3, 90), cameras=st.integers(2, 6), copies=st.just(0), seed=st.integers(0, 10**6)), st.randoms())
def test_the_order_of_images_does_not_matter(case, random):
    x, cams = case
    order = np.array(random.sample(range(len(x)), len(x)))
    names = np.array(random.sample(range(-50, 50), 10))[np.unique(cams, return_inverse=True)[1]]  # nor do the cameras' names
    got = camera_jaccard(x[order], names[order]).toarray()
    np.testing.assert_allclose(got, camera_jaccard(x, cams).toarray()[np.ix_(order, order)], atol=3e-6)


def test_many_blocks():
    x, cams = scene(4500, 4, 300, 1, "tiny")
    s = x.astype(np.float64) @ x.T.astype(np.float64)
    same = cams[:, None] == cams
    (_, own), (_, far) = neighbors._camera_lists(x, np.unique(cams, return_inverse=True)[1], (5, 20), (2, 4))
    for got, part, ends in (own[:, 1:], same & ~np.eye(len(x), dtype=bool), 0), (far, ~same, 0):
        want = -np.sort(-np.where(part, s, -np.inf), axis=1)[:, :got.shape[1]]
        mine = np.where(got < len(x), np.take_along_axis(s, np.minimum(got, len(x) - 1), 1), -np.inf)
        np.testing.assert_allclose(mine, want, atol=1e-6)


def test_ties_go_to_the_lower_index():
    "Four copies in each of two cameras: an image leads its own list, its copies follow in order."
    x, codes = np.repeat(np.eye(3, dtype=np.float32)[:1], 8, 0), np.array([0, 1] * 4)
    (_, own), (_, far) = neighbors._camera_lists(x, codes, (2, 2), (1, 1))
    assert own.tolist() == [[0, 2, 4], [1, 3, 5], [2, 0, 4], [3, 1, 5], [4, 0, 2], [5, 1, 3], [6, 0, 2], [7, 1, 3]]
    assert far.tolist() == [[1, 3, 5], [0, 2, 4]] * 4


def test_one_camera_is_the_plain_similarity(capsys):
    x, _ = scene(60, 2, 0, 3)
    assert abs(camera_jaccard(x, np.full(60, 4)) - jaccard_similarity(x, 30, 6)).max() == 0
    assert "one camera" in capsys.readouterr().out
    np.testing.assert_array_equal(camera_re_rank(x[:9], x[9:], [2] * 9, [2] * 51), re_rank(x[:9], x[9:]))


@pytest.mark.parametrize("words, message", [
    (dict(cams=None), "needs to know the camera"), (dict(cams=[0, 1]), r"expected \(20,\)"), (dict(cams=[.5] * 20), "whole numbers"),
    (dict(k1=5), "expected two whole numbers"), (dict(k2=(0, 4)), "at least 1"), (dict(k1=(1, 2, 3)), "expected two"), (dict(min_similarity=-1), "min_similarity"),
])
def test_errors_say_what_to_do(words, message):
    x, cams = scene(20, 3, 0, 0)
    with pytest.raises(ValueError, match=message): camera_jaccard(x, **{"cams": cams, **words})


def test_unknown_cameras_of_the_gallery():
    x, cams = scene(20, 3, 0, 0)
    with pytest.raises(ValueError, match="g_cams: found None"): camera_re_rank(x[:5], x[5:], cams[:5], None)
