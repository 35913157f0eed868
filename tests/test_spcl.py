"SpCL: the reference implementation's numbers, sets as an oracle, corner cases, and runs."
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from reidbook import training
from reidbook.cli import main
from reidbook.clustering import dbscan
from reidbook.data import open_dataset
from reidbook.memory import HybridMemory
from reidbook.methods.spcl import (CRITERIA, SpCL, believed, class_distance, class_minimum, dissolve, independence_threshold, lone_groups, own_classes, reliable_labels, survey,
                                   without_lone)
from reidbook.neighbors import jaccard_similarity


@pytest.fixture(scope="module")
def g(golden): return golden("next_spcl")


def relative(got, want): return np.abs(got - want).max() / np.abs(want).max()


# -- golden ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("epoch, features", [("e0", "in_features"), ("e1", "in_features_e1")])
def test_golden_labels(g, epoch, features):
    similarity = jaccard_similarity(g[features], 30, 6)
    assert_allclose(1 - similarity.toarray(), g[f"out_{epoch}_dist"], atol=2e-6)
    for eps, name in (.6, "mid"), (.58, "tight"), (.62, "loose"): assert_array_equal(dbscan(similarity, eps, 4), g[f"out_{epoch}_{name}"])
    for graph in similarity, 1 - g[f"out_{epoch}_dist"]:
        got = reliable_labels(graph, threshold=None if epoch == "e0" else g["out_threshold"])
        assert got.independence.dtype == got.compactness.dtype == np.float32
        assert_array_equal(got.independence, g[f"out_{epoch}_indep"])
        assert_array_equal(got.compactness, g[f"out_{epoch}_comp"])
        assert_allclose(got.threshold, g["out_threshold"], atol=1e-6)
        assert_array_equal(partition(got.labels), partition(g[f"out_{epoch}_labels"]))
        found = survey(graph)
        assert_array_equal(class_minimum(found.classes, found.independence), g[f"out_{epoch}_cluster_indep"])
        assert_array_equal(class_minimum(found.classes, found.compactness), g[f"out_{epoch}_cluster_comp"])


def partition(labels):
    "Every image's first companion: equal for equal partitions."
    return np.unique(labels, return_index=True)[1][np.unique(labels, return_inverse=True)[1]]


def test_golden_labels_have_gaps(g):
    labels = reliable_labels(1 - g["out_e0_dist"]).labels
    assert len(np.unique(labels)) < labels.max() + 1 and labels.min() == 0


@pytest.mark.parametrize("epoch, features", [("e0", "in_features"), ("e1", "in_features_e1")])
def test_golden_loss_of_our_labels(g, epoch, features):
    "With our numbers for the classes, which are the released ones up to their names."
    labels = reliable_labels(1 - g[f"out_{epoch}_dist"], threshold=g["out_threshold"]).labels
    for names in labels, own_classes(without_lone(labels)):
        memory, batch = HybridMemory(g[features], names), torch.tensor(g[f"in_{epoch}_batch"], requires_grad=True)
        loss = memory(batch, g[f"in_{epoch}_index"])
        assert_allclose(loss.item(), g[f"out_{epoch}_loss"], atol=2e-5)
        loss.backward()
        assert relative(batch.grad.numpy(), g[f"out_{epoch}_grad"]) < 1e-4
        memory.update(batch, g[f"in_{epoch}_index"])
        assert_allclose(memory.features, g[f"out_{epoch}_memory"], atol=2e-6)


# -- against sets of images -----------------------------------------------------------------------------------------------------
def by_sets(labels):
    "The set of companions of every image; an outlier is alone."
    return [{j for j, other in enumerate(labels) if other == own} if own >= 0 else {i} for i, own in enumerate(labels)]


def reliable_by_sets(similarity, eps, gap, min_samples, threshold, share):
    middle, tight, loose = (by_sets(dbscan(similarity, e, min_samples).tolist()) for e in (eps, eps - gap, eps + gap))
    far = lambda a, b: np.float32(1) - np.float32(len(a & b)) / np.float32(len(a | b))
    independence, compactness = ([far(a, b) for a, b in zip(middle, other)] for other in (loose, tight))
    least = lambda values, i: min(values[j] for j in middle[i])
    if threshold is None:
        one_each = sorted(least(independence, i) for i in range(len(middle)) if len(middle[i]) > 1 and i == min(middle[i]))
        threshold = one_each[min(len(one_each) - 1, round(share * len(one_each)))] if one_each else 1
    keep = [least(independence, i) <= threshold and compactness[i] <= least(compactness, i) for i in range(len(middle))]
    return [frozenset(j for j in middle[i] if keep[j]) if keep[i] else frozenset({i}) for i in range(len(middle))], threshold


@given(st.integers(0, 10**6), st.sampled_from([None, 0., .3, 1.]), st.floats(0, 1))
def test_labels_against_sets(seed, threshold, share):
    rng = np.random.default_rng(seed)
    x = np.round(rng.random((18, 18)) * .5, 2)
    similarity = (x + x.T).astype(np.float32) * (rng.random((18, 18)) < .5)
    similarity = np.maximum(similarity, similarity.T)
    got = reliable_labels(sp.csr_matrix(similarity), .4, .05, 3, threshold=threshold, share=share)
    sets, want = reliable_by_sets(similarity, .4, .05, 3, threshold, share)
    assert [frozenset(s) for s in by_sets(got.labels.tolist())] == sets and got.threshold == want


# -- corners --------------------------------------------------------------------------------------------------------------------
def test_no_cluster_at_all():
    got = reliable_labels(np.eye(5, dtype=np.float32))
    assert got.threshold == 1 and sorted(got.labels) == [0, 1, 2, 3, 4]


def test_criteria_are_nested():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 6)).astype(np.float32)
    found = survey(jaccard_similarity(x / np.linalg.norm(x, axis=1, keepdims=True), 20, 4), .5, .05)
    keep = {c: believed(found, independence_threshold(found, .5), c) for c in CRITERIA}
    assert keep["none"].all() and (keep["both"] == keep["independence"] & keep["compactness"]).all()
    assert 0 < keep["both"].sum() < min(keep["independence"].sum(), keep["compactness"].sum()) < 300


def test_refused():
    with pytest.raises(ValueError, match="gap"): reliable_labels(np.eye(4), .6, .7)
    with pytest.raises(ValueError, match="share"): reliable_labels(np.eye(4), share=2)
    with pytest.raises(ValueError, match="threshold"): reliable_labels(np.eye(4), threshold=np.nan)
    with pytest.raises(ValueError, match="one of both, independence"): reliable_labels(np.eye(4), criteria="all")
    with pytest.raises(ValueError, match="eps - gap above 0"): training.resolve(SpCL, "market1501", gap=.45)


def test_labels_are_not_changed_in_place():
    labels = np.array([0, -1, 0, -1])
    assert own_classes(labels).tolist() == [0, 1, 0, 2] and labels.tolist() == [0, -1, 0, -1]
    assert own_classes([-1, -1]).tolist() == [0, 1]
    assert class_distance([0, 0, 1], [0, 1, 1]).tolist() == [.5, np.float32(1) - np.float32(1) / np.float32(3), .5]
    assert without_lone(dissolve(np.array([0, 0, 0, 1, 1]), np.array([True, True, False, False, True]))).tolist() == [0, 0, -1, -1, -1]


@pytest.mark.parametrize("alone", [0, 1, 3, 4, 9])
def test_lone_images_share_groups(alone):
    labels = np.r_[0, 0, np.full(alone, -1), 1, 1]
    drawn = lone_groups(labels, 4, np.random.default_rng(0))
    assert_array_equal(drawn[labels >= 0], labels[labels >= 0])
    sizes = np.bincount(drawn[labels < 0], minlength=2)[2:]
    assert sizes.sum() == alone and len(sizes) == (alone > 0) * max(1, alone // 4) and (sizes >= min(alone, 4)).all()


# -- runs -----------------------------------------------------------------------------------------------------------------------
def run(tiny, out=None, stop=None, **given):
    settings = training.resolve(SpCL, tiny.name, **dict(epochs=3, iterations=3, batch_size=16, eval_every=9) | given)
    t = training.start(tiny, SpCL, settings, seed=1, out=out)
    for r in training.epochs(t):
        if r["epoch"] == stop: break
    return t


def records(t): return [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in t.history]


@pytest.fixture(scope="module")
def tiny(root): return open_dataset("synthetic-tiny", root)


@pytest.fixture(scope="module")
def whole(tiny): return run(tiny)


def test_a_resumed_run_equals_an_undisturbed_one(tiny, tmp_path, whole):
    run(tiny, tmp_path, stop=1)
    again = run(tiny, tmp_path)
    assert records(again) == records(whole) and again.method.threshold == whole.method.threshold
    assert_array_equal(again.method.rows, whole.method.rows)


def test_the_memory_is_what_is_clustered(tiny, whole, monkeypatch):
    "One pass over the training images for all epochs, unless `fresh`."
    passes = []
    monkeypatch.setattr(training, "features", lambda t, images, model=None, old=training.features: passes.append(len(images)) or old(t, images, model))
    assert records(run(tiny)) == records(whole)
    assert passes.count(len(whole.images)) == 1
    passes.clear()
    assert records(run(tiny, fresh=True)) != records(whole) and passes.count(len(whole.images)) == 3


def test_every_image_is_drawn_and_the_threshold_stays(tiny, whole):
    assert whole.method.groups(whole).min() == 0 and (whole.labels == -1).any()
    assert all(0 <= r["believed"] <= 1 and 0 <= r["threshold_now"] <= 1 for r in whole.history)
    assert whole.history[0]["threshold_now"] == round(whole.method.threshold, 6)
    assert_allclose(whole.method.rows.norm(dim=1), 1, atol=1e-5)


def test_settings_reach_the_run(tiny, whole):
    for name, value in dict(gap=.1, share=.2, criteria="none", momentum=.9, temperature=.2, sampler="released").items():
        assert records(run(tiny, **{name: value})) != records(whole), name


def test_kept_labels_of_another_start(tiny):
    t = run(tiny, start="histogram")
    assert len(t.history) == 3 and "believed" not in t.history[1]
    assert t.history[0]["outliers"] == t.history[2]["outliers"]


def test_command_line(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("REIDBOOK_RUNS", str(tmp_path))
    main(f"run --dataset synthetic-tiny --method spcl --root {root} -p epochs=1 -p iterations=2 -p batch_size=16".split())
    assert "mAP" in capsys.readouterr().out and list(tmp_path.glob("synthetic-tiny-spcl-s1-*"))
