"ICSR against the reference vectors, against slow recomputations, and where it must do nothing."
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import silhouette_score

from reidbook import runs, training
from reidbook.clustering import agglomerative
from reidbook.data import open_dataset
from reidbook.memory import ClusterMemory
from reidbook.methods import icsr
from reidbook.methods.baseline import Baseline
from reidbook.methods.icsr import ICSR, information_nodes, local_clusters, local_count, node_scores, pace, refine_labels, silhouette
from reidbook.neighbors import jaccard_similarity, knn


@pytest.fixture(scope="module")
def g(golden): return golden("icsr")


def first_seen(labels): return np.unique(labels, return_index=True, return_inverse=True)[1][np.unique(labels, return_inverse=True)[1]]


def pairs(nodes): return {int(c): int(i) for c, i in nodes}


# --- reference vectors

def test_golden_arguments(g):
    a = json.loads(str(g["args"]))
    assert (a["k1"], a["k2"], a["knn"], a["min_sim"], a["intra_div"]) == (30, 6, 15, 0.5, 5)


@pytest.mark.parametrize("cam", [1, 2, 3, 4])
def test_golden_stage_one(g, cam):
    feats = g["features"][g[f"s1_index_cam{cam}"]]
    assert np.abs(1 - jaccard_similarity(feats, 30, 6).toarray() - g[f"s1_jaccard_cam{cam}"]).max() < 1e-6
    labels, score = local_clusters(feats)
    assert (first_seen(labels) == first_seen(g[f"s1_labels_cam{cam}"])).all()
    assert abs(score - g["s1_silhouette"][cam - 1]) < 1e-6


def test_golden_global_labels(g):
    sim = jaccard_similarity(g["features"], 30, 6)
    assert np.abs(1 - sim.toarray() - g["s2_jaccard"]).max() < 1e-6
    assert (first_seen(agglomerative(sim, g["s2_ac_labels"].max() + 1)) == first_seen(g["s2_ac_labels"])).all()


def test_golden_scores(g):
    assert np.abs(node_scores(1 - g["s2_knn_dist"], g["s2_knn_idx"]) - g["s2_score"]).max() < 1e-6
    assert np.abs(node_scores(*knn(g["features"], 15)) - g["s2_score"]).max() < 1e-4      # the neighbours searched for here
    assert abs(g["s2_score"].mean() - g["s2_score_mean"]) < 1e-9


@pytest.mark.parametrize("rule,key", [("last", "s2_info_node"), ("max", "s2_dominant_node")])
def test_golden_nodes(g, rule, key):
    assert information_nodes(g["s2_score"], g["s2_infomap_labels"], rule) == pairs(g[key])


@pytest.mark.parametrize("rule,suffix", [("last", ""), ("max", "_dom")])
@pytest.mark.parametrize("kind", ["ac", "infomap"])
def test_golden_refinement(g, rule, suffix, kind):
    nodes, labels = information_nodes(g["s2_score"], g["s2_infomap_labels"], rule), g[f"s2_{kind}_labels"]
    new = refine_labels(labels, nodes, g["cams"], g["s1_local_label"])
    assert (new == g[f"s2_refined_{kind}{suffix}"]).all()
    assert (new != labels).sum() == g[f"s2_removed_{kind}{suffix}"] > 0


def test_golden_self_paced(g):
    "The reference's two candidates both drew below the rate of epoch 40; a draw above it keeps an image."
    labels, nodes = g["s2_infomap_labels"], pairs(g["s2_info_node"])
    candidates = np.flatnonzero(refine_labels(labels, nodes, g["cams"], g["s1_local_label"]) != labels)
    draws = np.ones(len(labels))
    draws[candidates] = pace(40, 50) - 1e-6
    assert (refine_labels(labels, nodes, g["cams"], g["s1_local_label"], pace(40, 50), draws) == g["s2_refined_selfpaced_infomap_e40"]).all()
    draws[candidates[0]] = pace(40, 50)
    kept = refine_labels(labels, nodes, g["cams"], g["s1_local_label"], pace(40, 50), draws)
    assert kept[candidates[0]] == labels[candidates[0]] and (kept[candidates[1:]] == -1).all()


@pytest.mark.parametrize("rule,key", [("mean", "cm"), ("hard", "hard")])
def test_golden_memory(g, rule, key):
    memory, x = ClusterMemory(g["m_before"], 0.1, 0.05, rule), torch.tensor(g["m_inputs"], requires_grad=True)
    targets = torch.tensor(g["m_targets"])
    loss = memory(x, targets)
    loss.backward()
    memory.update(x, targets)
    assert abs(loss.item() - g[f"m_{key}_loss"]) < 1e-6
    assert np.abs(x.grad.numpy() - g[f"m_{key}_grad"]).max() < 1e-5 * np.abs(g[f"m_{key}_grad"]).max()
    assert np.abs(memory.prototypes.numpy() - g[f"m_{key}_after"]).max() < 1e-6


# --- slow recomputations

def case(seed, n=60):
    rng = np.random.default_rng(seed)
    return rng, rng.integers(-1, 6, n), rng.integers(0, 3, n), rng.integers(0, 4, n), rng.permuted(np.r_[np.zeros(5), rng.random(n - 5)])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("rule", ["max", "last"])
def test_refinement_as_the_text_says(seed, rule):
    rng, labels, cams, local, scores = case(seed)
    groups = rng.integers(-1, 9, len(labels))                          # nodes of another clustering: several share a global cluster
    nodes, wanted = information_nodes(scores, groups, rule), {}
    for c in range(groups.max() + 1):
        able = [i for i in range(len(scores)) if groups[i] == c and scores[i] > (0 if rule == "max" else scores.mean())]
        if able: wanted[c] = max(able, key=lambda i: scores[i]) if rule == "max" else able[-1]
    assert nodes == wanted
    slow = labels.copy()
    for c in sorted(wanted):
        v = wanted[c]
        if slow[v] == -1: continue
        for u in range(len(labels)):
            if labels[u] == labels[v] and cams[u] == cams[v] and local[u] != local[v]: slow[u] = -1
    new = refine_labels(labels, nodes, cams, local)
    assert (new == slow).all()
    assert (new[new != labels] == -1).all()                            # it only ever leaves out
    assert set(np.unique(labels)) - {-1} == set(np.unique(new)) - {-1}  # and empties no cluster


@pytest.mark.parametrize("seed", range(5))
def test_scores_as_the_text_says(seed):
    feats = np.random.default_rng(seed).normal(0.4, 1, (40, 6)).astype(np.float32)
    feats /= np.linalg.norm(feats, axis=1, keepdims=True)
    sims, idx = knn(feats, 7)
    mean = np.mean([[1 - s for s in row] for row in sims.astype(np.float64)])
    slow = [sum(1 / (1 - float(s) + mean) for s, j in zip(sims[i], idx[i]) if j != i and s >= 0.5) for i in range(40)]
    assert np.allclose(node_scores(sims, idx), slow, atol=1e-6)
    assert np.allclose(node_scores(torch.tensor(sims), torch.tensor(idx)), slow, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_silhouette_is_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    sim = jaccard_similarity(rng.normal(size=(50, 8)), 10, 3)
    dist = np.maximum(1 - sim.toarray().astype(np.float64), 0)
    np.fill_diagonal(dist, 0)
    labels = np.r_[np.arange(12), rng.integers(0, 12, 38)]
    assert abs(silhouette(sim, labels) - silhouette_score(dist, labels, metric="precomputed")) < 1e-5


# --- where it must do nothing

def test_no_op_when_local_clusters_agree():
    _, labels, cams, _, scores = case(3)
    for local in (labels, np.zeros_like(labels), np.where(cams == 1, 7, labels)):
        assert (refine_labels(labels, information_nodes(scores, labels), cams, local) == labels).all()


def test_no_op_without_nodes():
    _, labels, cams, local, _ = case(4)
    nodes = information_nodes(np.zeros(len(labels)), labels)           # nobody has an edge
    assert nodes == {} and (refine_labels(labels, nodes, cams, local) == labels).all()
    assert information_nodes(np.ones(len(labels)), labels, "last") == {}  # nobody is above the mean


def test_no_op_when_every_image_has_its_own_camera():
    _, labels, _, local, scores = case(5)
    assert (refine_labels(labels, information_nodes(scores, labels), np.arange(len(labels)), local) == labels).all()


def test_no_op_at_rate_zero_and_everything_at_one():
    rng, labels, cams, local, scores = case(6)
    nodes, draws = information_nodes(scores, labels), rng.random(len(labels))
    assert (refine_labels(labels, nodes, cams, local, 0.0, draws) == labels).all()
    assert (refine_labels(labels, nodes, cams, local, 1.0, draws) == refine_labels(labels, nodes, cams, local)).all()


def test_other_cameras_are_untouched():
    _, labels, cams, local, scores = case(7)
    nodes = information_nodes(scores, labels)
    out = np.flatnonzero(refine_labels(labels, nodes, cams, local) != labels)
    assert len(out) and all(cams[u] == cams[nodes[labels[u]]] for u in out)


def test_input_is_left_alone():
    _, labels, cams, local, scores = case(8)
    before = labels.copy()
    refine_labels(labels, information_nodes(scores, labels), cams, local)
    assert (labels == before).all()


# --- small cameras, wrong input

@pytest.mark.parametrize("n,clusters,expected", [(100, 0, 20), (4000, 600, 600), (900, 600, 180), (7, 0, 1), (1, 0, 1), (23, 0, 4)])
def test_local_count(n, clusters, expected): assert local_count(n, clusters) == expected


@pytest.mark.parametrize("n", [1, 2, 5, 9, 10, 12, 22, 31])
def test_small_cameras_are_clustered(n):
    labels, score = local_clusters(np.random.default_rng(n).normal(size=(n, 8)).astype(np.float32))
    assert len(labels) == n and labels.max() + 1 == local_count(n) and np.isfinite(score)


def test_refusals():
    with pytest.raises(ValueError, match="which camera"): refine_labels([0, 0], {}, None, [0, 0])
    with pytest.raises(ValueError, match="rule"): information_nodes([1.0], [0], "first")
    with pytest.raises(ValueError, match="one per image"): information_nodes([1.0], [0, 1])
    with pytest.raises(ValueError, match="cams: found shape"): refine_labels([0, 0], {}, [0], [0, 0])
    with pytest.raises(ValueError, match="from 0 to 2"): node_scores(np.ones((3, 2)), np.ones((3, 3)))


def test_pace(): assert pace(0, 50) == 1 and abs(pace(50, 50) - 0.75) < 1e-12


# --- the two stages

@pytest.fixture(scope="module")
def tiny(root): return dataclasses.replace(open_dataset("synthetic-tiny", root), query=None, gallery=None)


def run(tiny, store=None, out=None, stop=None, seed=1, **settings):
    settings = training.resolve(ICSR, tiny.name, **dict(epochs=2, iterations=3, camera_epochs=2, camera_iterations=2) | settings)
    t = training.start(tiny, ICSR, settings, seed=seed, out=out, store=store)
    for r in training.epochs(t):
        if r["epoch"] == stop: break
    return t


def records(t): return [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in t.history]


def test_stage_one_is_found_again(tiny, tmp_path, monkeypatch):
    first = run(tiny, tmp_path)
    assert len(list(tmp_path.glob("camera*/result.pt"))) == 4
    monkeypatch.setattr(icsr, "train_camera", lambda *a: pytest.fail("stage 1 ran again"))
    assert records(run(tiny, tmp_path)) == records(first)
    again = run(tiny, tmp_path, stop=1, nodes="last", eps=0.5)          # stage 2 may change, stage 1 does not depend on it
    assert (again.method.local == first.method.local).all()
    with pytest.raises(pytest.fail.Exception): run(tiny, tmp_path, camera_iterations=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory): return tmp_path_factory.mktemp("stages")  # for tests that are not about stage 1


@pytest.fixture(scope="module")
def local(tiny, store): return run(tiny, store, stop=1).method.local  # stage 1, undisturbed


def test_stage_one_goes_on_after_a_kill(tiny, local, tmp_path, monkeypatch):
    real, calls = training.save_checkpoint, []
    def kill(t):
        real(t); calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt                    # in the second camera's first epoch
    monkeypatch.setattr(training, "save_checkpoint", kill)
    with pytest.raises(KeyboardInterrupt): run(tiny, tmp_path)
    monkeypatch.setattr(training, "save_checkpoint", real)
    assert len(list(tmp_path.glob("camera*/result.pt"))) == 1 and len(list(tmp_path.glob("camera*/checkpoint.pt"))) == 1
    assert (run(tiny, tmp_path, stop=1).method.local == local).all()


def test_side_by_side_is_one_after_another(tiny, local, monkeypatch):
    monkeypatch.setattr(icsr, "devices", lambda device: [device] * 3)
    assert (run(tiny, stop=1).method.local == local).all()


def test_best_epoch_is_the_best_separated(tiny, tmp_path):
    run(tiny, tmp_path, stop=1, camera_epochs=3)
    for f in tmp_path.glob("camera*/result.pt"):
        result = torch.load(f)
        assert len(result["silhouettes"]) == 3 and result["labels"].max() + 1 == local_count(len(result["labels"]))


def test_identities_play_no_part(tiny, store):
    blind = dataclasses.replace(tiny, train=tiny.train.drop(columns="pid"))
    a, b = run(tiny, store, stop=1), run(blind, stop=1)
    assert (a.labels == b.labels).all() and "removed" in b.history[0] and "removed_wrongly" not in b.history[0]


def test_resumed_equals_undisturbed(tiny, store, tmp_path):
    whole = run(tiny, store)
    run(tiny, store, tmp_path, stop=1)
    assert records(run(tiny, store, tmp_path)) == records(whole)


def test_cameras_unknown(tiny):
    with pytest.raises(ValueError, match="needs to know which camera"): run(dataclasses.replace(tiny, train=tiny.train.drop(columns="cam")))


def test_one_small_camera(tiny):
    cams = tiny.train.cam.to_numpy().copy()
    cams[:3], cams[3:10] = 9, 11                                       # three images, and seven
    t = run(dataclasses.replace(tiny, train=tiny.train.assign(cam=cams)), stop=1)
    assert (t.method.local[:10] == 0).all() and t.history


@pytest.mark.parametrize("settings", [dict(clustering="infomap", nodes="last"), dict(clustering="agglomerative", nodes_from="infomap", self_paced=True)])
def test_other_clusterings(tiny, store, settings):
    pytest.importorskip("infomap")
    t = run(tiny, store, **settings, min_similarity=0.7, epochs=1)
    assert t.history[-1]["clusters"] > 1


def test_without_nodes_it_is_the_baseline(tiny, tmp_path):
    t = run(tiny, tmp_path, nodes="none", bn_group_size=16)
    b = training.start(tiny, Baseline, training.resolve(Baseline, tiny.name, epochs=2, iterations=3))
    list(training.epochs(b))
    assert not list(tmp_path.iterdir()) and records(t) == records(b)


def test_wrong_settings(tiny):
    with pytest.raises(ValueError, match="clustering='kmeans'"): run(tiny, clustering="kmeans")
    with pytest.raises(ValueError, match="camera_epochs"): run(tiny, camera_epochs=0)


def test_papermill_runs_share_stage_one(root, tmp_path, monkeypatch):
    "Both stages from one command; a second run, whose stage 2 differs, finds stage 1."
    project = Path(__file__).parent.parent
    monkeypatch.setenv("PYTHONPATH", str(project))
    monkeypatch.setattr(runs, "runs_dir", lambda: tmp_path)
    settings = dict(epochs=1, iterations=3, camera_epochs=1, camera_iterations=2)
    first = runs.execute("synthetic-tiny", "icsr", root=root, settings=settings)
    made = {p: p.stat().st_mtime_ns for p in tmp_path.glob("stages/camera*/result.pt")}
    second = runs.execute("synthetic-tiny", "icsr", root=root, settings=settings | {"nodes": "last"})
    assert len(made) == 4 and {p: p.stat().st_mtime_ns for p in tmp_path.glob("stages/camera*/result.pt")} == made
    for out in (first, second):
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["status"] == "done" and manifest["metrics"]["mAP"] > 0
        assert "removed" in json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
