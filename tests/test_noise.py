"Label quality against the reference numbers, scikit-learn and brute force; the taxonomy's bookkeeping; figures draw."
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn import metrics

from reidbook.noise import (KINDS, contingency, label_quality, noise_kinds, noise_record, noise_table, plot_clusters_over_epochs, plot_contingency,
                            plot_noise)


def seven(q):
    return [q.pairwise_precision, q.pairwise_recall, q.pairwise_f, q.bcubed_precision, q.bcubed_recall, q.bcubed_f, q.nmi]


def test_reference_random_and_pseudo(golden):
    g = golden("noise")
    np.testing.assert_allclose(seven(label_quality(g["met_rand_b"], g["met_rand_a"])), g["met_rand"], atol=1e-12)
    np.testing.assert_allclose(seven(label_quality(g["in_pseudo"], g["in_gt"])), g["met_gt_vs_pseudo"], atol=1e-12)


@pytest.mark.parametrize("setting", ["repo", "notrunc", "starfc", "loose", "strict"])
def test_reference_decoded_labels(golden, setting):
    g = golden("noise")
    np.testing.assert_allclose(seven(label_quality(g[f"dec_{setting}_labels"], g["in_gt"])), g[f"dec_{setting}_metrics_all"], atol=1e-12)
    np.testing.assert_allclose(seven(label_quality(g[f"dec_{setting}_relabel"], g["in_gt"])), g[f"dec_{setting}_metrics_kept"], atol=1e-12)


@pytest.mark.parametrize("name", ["ac", "infomap"])
def test_reference_information_nodes(golden, name):
    g = golden("noise")
    for suffix, labels in (("", f"s2_{name}_labels"), ("_refined", f"s2_refined_{name}")):
        q, want = label_quality(g[labels], g["pids"]), g[f"q_{name}{suffix}"]
        np.testing.assert_allclose(seven(q), want[[0, 1, 2, 3, 4, 5, 7]], atol=1e-12)
        assert q.images == want[8]


labelled = st.integers(2, 40).flatmap(lambda n: st.tuples(st.lists(st.integers(-1, 5), min_size=n, max_size=n), st.lists(st.integers(0, 5), min_size=n, max_size=n)))


@given(labelled)
@settings(max_examples=100, deadline=None)
def test_against_scikit_learn_and_brute_force(case):
    labels, pids = map(np.array, case)
    q, kept = label_quality(labels, pids), labels >= 0
    assert q.outliers == (~kept).sum() and q.images == kept.sum()
    if not kept.any(): return
    l, p = labels[kept], pids[kept]
    assert q.nmi == pytest.approx(metrics.normalized_mutual_info_score(p, l), abs=1e-9)
    assert q.ari == pytest.approx(metrics.adjusted_rand_score(p, l), abs=1e-9)
    mates, me = l[:, None] == l, p[:, None] == p
    assert q.bcubed_precision == pytest.approx(((mates & me).sum(1) / mates.sum(1)).mean())
    assert q.bcubed_recall == pytest.approx(((mates & me).sum(1) / me.sum(1)).mean())
    both, n = (mates & me).sum() - len(l), len(l)
    assert q.pairwise_precision == pytest.approx(both / (mates.sum() - n) if mates.sum() > n else 0)
    assert q.pairwise_recall == pytest.approx(both / (me.sum() - n) if me.sum() > n else 0)


@given(labelled, st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_taxonomy_is_a_partition_that_names_do_not_change(case, seed):
    labels, pids = map(np.array, case)
    tables = noise_table(labels, pids)
    assert tables.kinds.images.sum() == len(labels) and list(tables.kinds.index) == list(KINDS)
    assert tables.clusters["size"].sum() == (labels >= 0).sum()
    assert tables.identities.images.sum() == len(labels)
    kinds = noise_kinds(labels, pids)
    assert ((kinds == "outlier") == (labels < 0)).all()
    assert ((kinds == "merged").sum() > 0) == bool(tables.clusters.merged.any())
    order = np.random.default_rng(seed).permutation(len(labels))
    assert (noise_kinds(labels[order], pids[order]) == kinds[order]).all()


def test_perfect_labels_have_no_noise():
    pids = np.repeat(np.arange(9), 5)
    q = label_quality(pids + 3, pids)
    assert seven(q) == [1] * 7 and q.ari == 1
    assert set(noise_kinds(pids + 3, pids, np.tile(np.arange(5), 9))) == {"right"}


def test_camera_split_needs_evidence():
    labels, pids = [0, 0, 0, 1, 1, 2], [4] * 6
    assert noise_kinds(labels, pids, [0, 1, 1, 2, 2, 0]).tolist() == ["right"] * 3 + ["camera split"] * 2 + ["split"]
    assert "camera split" not in noise_kinds(labels, pids, [3] * 6)  # a person of one camera cannot be split by camera
    table = noise_table(labels, pids, [0, 1, 1, 2, 2, 0])
    assert table.clusters.camera_split.tolist() == [False, True, False]


def test_inputs_torch_lists_and_refusals():
    labels, pids = [0, 0, 1, -1], [5, 5, 5, 6]
    assert label_quality(torch.tensor(labels), torch.tensor(pids)) == label_quality(labels, pids) == label_quality(np.float32(labels), pids)
    with pytest.raises(ValueError, match="4 labels but 3 identities"): label_quality(labels, pids[:3])
    with pytest.raises(ValueError, match="shape"): label_quality(np.eye(3), pids)
    with pytest.raises(ValueError, match="whole"): label_quality([0.5, 0, 0, 0], pids)
    with pytest.raises(ValueError, match="3 cameras"): noise_kinds(labels, pids, [0, 0, 0])
    assert label_quality([], []).clusters == 0 and label_quality([-1] * 4, pids).nmi == 0
    assert noise_table([-1] * 4, pids, [0] * 4).kinds.loc["outlier", "images"] == 4


def test_memory_is_linear():
    rng = np.random.default_rng(0)
    labels, pids = rng.integers(-1, 60_000, 200_000), rng.integers(0, 60_000, 200_000)
    assert len(contingency(labels, pids).count) <= 200_000  # a dense table would hold 3.6e9 cells
    assert label_quality(labels, pids).ari == pytest.approx(0, abs=1e-3)


def test_figures():
    rng = np.random.default_rng(0)
    labels, pids, cams = rng.integers(-1, 9, 200), rng.integers(0, 9, 200), rng.integers(0, 3, 200)
    records = [{"epoch": e, "loss": 1.0, **noise_record(labels, pids, cams)} for e in range(3)]
    for draw in (lambda: plot_noise(labels, pids, cams), lambda: plot_contingency(labels, pids), lambda: plot_clusters_over_epochs(records),
                 lambda: plot_noise([-1] * 4, [0, 0, 1, 1])):
        draw()
        plt.gcf().canvas.draw()
        plt.close("all")
    with pytest.raises(ValueError, match="epoch"): plot_clusters_over_epochs([{"loss": 1}])
