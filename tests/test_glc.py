"GLC: the released network, training and decoding step for step; corrected labels on made noise; the plug in the loop."
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reidbook import training
from reidbook.methods import glc
from reidbook.memory import prototypes
from reidbook.neighbors import knn
from reidbook.noise import label_quality


@pytest.fixture(scope="module")
def gold(golden):
    z = golden("glc")
    return {k: v.astype(np.int64) if v.dtype == np.int16 else v for k, v in z.items()}


@pytest.fixture
def net(gold): return glc.link_network(gold["in_features"].shape[1], int(gold["in_nhid"]), seed=int(gold["in_net_seed"]))


def same_sets(a, b): return sorted(map(tuple, np.asarray(a))) == sorted(map(tuple, np.asarray(b)))


def inputs_of(x, k):
    x = glc.unit(x)
    graph = glc.affinity_graph(x, k)
    return glc.node_inputs(x, graph), graph.tocoo()


# ---------------------------------------------------------------------------------------------------------------- graph

def test_graph_is_the_released_one(gold):
    graph = glc.affinity_graph(gold["in_features"], int(gold["in_k"])).tocoo()
    ours = dict(zip(zip(graph.row, graph.col), graph.data))
    want = dict(zip(map(tuple, gold["adj_coo_index"].T), gold["adj_coo_value"]))
    assert ours.keys() == want.keys()
    np.testing.assert_allclose([ours[e] for e in want], list(want.values()), atol=1e-6)


def test_graph_against_a_dense_float64_one():
    x = np.random.default_rng(0).normal(size=(60, 8))
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    s = u @ u.T
    a = np.zeros((60, 60))
    for i in range(60):
        near = np.argsort(-s[i])[:7]
        a[i, near] = np.clip(s[i, near], 0, 1)
    np.fill_diagonal(a, 0)
    a = np.maximum(a, a.T) + np.eye(60)
    np.testing.assert_allclose(glc.affinity_graph(torch.from_numpy(x), 7).toarray(), a / a.sum(1, keepdims=True), atol=1e-6)


def test_mixed_neighbours_are_the_released_ones(gold):
    sims, idx = glc.graph_neighbors(gold["in_features"], gold["knn_new_nbrs"].shape[1], gold["knn_new_scores"])
    np.testing.assert_allclose(np.clip(sims, 0, 1), gold["knn_new_sims"], atol=1e-6)
    np.testing.assert_array_equal(idx, gold["knn_new_nbrs"])


# -------------------------------------------------------------------------------------------------------------- network

def test_fresh_weights_are_the_released_ones(gold, net):
    state = torch.random.get_rng_state()
    np.testing.assert_array_equal(net["gcn.weight"].detach(), gold["gcn_w_conv1.weight"])
    np.testing.assert_array_equal(net["pair.weight"].detach()[:4], gold["head0_rows"])
    np.testing.assert_array_equal(net["out.weight"].detach(), gold["head2"])
    assert torch.equal(state, torch.random.get_rng_state())


def test_forward(gold, net):
    inputs, _ = inputs_of(gold["in_features"], int(gold["in_k"]))
    np.testing.assert_allclose(glc.nodes(net, inputs).detach()[:32], gold["gcn_out_rows"], atol=1e-5)
    np.testing.assert_allclose(glc.score_pairs(net, inputs, gold["gcn_pairs"], chunk=1000), gold["gcn_pair_scores"], atol=1e-5)
    _, idx = knn(glc.unit(gold["in_features"]), int(gold["in_k"]))
    assert same_sets(glc.candidate_pairs(idx).T, gold["gcn_pairs"].T)


def test_head_on_pairs_side_by_side(net):
    h, pairs = torch.rand(9, 512), torch.randint(9, (2, 30))
    z = torch.cat([h[pairs[0]], h[pairs[1]]], 1) @ net["pair.weight"].T + net["pair.bias"]
    want = torch.where(z > 0, z, z * net["pair.slope"]) @ net["out.weight"].T + net["out.bias"]
    torch.testing.assert_close(glc.pair_logits(net, h, pairs), want, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------- training

@pytest.fixture
def training_set(gold):
    "Inputs, edges in the released order, link labels."
    keep = gold["train_keep"]
    inputs, graph = inputs_of(gold["in_features"][keep], int(gold["in_k"]))
    edges = gold["train_coo_index"]
    assert same_sets(edges.T, np.stack([graph.row, graph.col]).T)
    labels = gold["in_pseudo"][keep]
    return inputs, torch.from_numpy(edges), torch.from_numpy((labels[edges[0]] == labels[edges[1]]).astype(np.int64))


@pytest.mark.parametrize("name, gamma", [("ce", 0.0), ("focal", 2.0)])
def test_loss_and_gradients(gold, net, training_set, name, gamma):
    "In float64: in float32 some processors round a hidden unit across the kink of the ReLU (1.3e-5 of the largest)."
    inputs, edges, same = training_set
    inputs = inputs.double()
    net = {k: v.detach().double().requires_grad_() for k, v in net.items()}
    loss = glc.focal_loss(glc.pair_logits(net, glc.nodes(net, inputs), edges), same, gamma)
    loss.backward()
    assert abs(loss.item() - gold[f"train_{name}_loss"]) < 1e-6
    for ours, want in [(net["gcn.weight"].grad[:, ::8], "conv_w"), (net["pair.weight"].grad[:4], "head0_w"),
                       (net["pair.slope"].grad, "prelu")]:
        want = gold[f"train_{name}_grad_{want}"]
        np.testing.assert_allclose(ours, want, rtol=0, atol=1e-6 * np.abs(want).max())


def test_eighty_steps(gold, net, training_set):
    inputs, edges, same = training_set
    optimizer = torch.optim.SGD(net.values(), lr=float(gold["train_traj_lr"]), momentum=0.9, weight_decay=1e-5)
    losses = glc.train_subgraph(net, optimizer, inputs, edges, same, torch.from_numpy(gold["train_edge_order"]))
    np.testing.assert_allclose(losses, gold["train_traj_loss"], atol=1e-4)
    for ours, want in [("gcn.weight", "g_conv1.weight"), ("gcn.bias", "g_conv1.bias"), ("pair.slope", "h_classifier.1.weight"), ("out.weight", "h_classifier.2.weight")]:
        np.testing.assert_allclose(net[ours].detach(), gold[f"train_final_{want}"], atol=1e-4)


def test_centres_and_their_neighbours(gold):
    keep = gold["train_keep"]
    centres = prototypes(glc.unit(gold["in_features"][keep]), np.unique(gold["in_pseudo"][keep], return_inverse=True)[1])
    np.testing.assert_allclose(centres, gold["train_centres"], atol=1e-5)
    near = knn(centres, gold["train_centre_nbrs"].shape[1])[1]
    np.testing.assert_array_equal(np.sort(near), np.sort(gold["train_centre_nbrs"]))


# ------------------------------------------------------------------------------------------------------------- decoding

SETTINGS = ["repo", "notrunc", "starfc", "loose", "strict"]


@pytest.mark.parametrize("name", SETTINGS)
def test_decoding(gold, name):
    k, t1, t2, tail = gold[f"dec_{name}_params"]
    drop = not tail  # the released decoding never reads the last pairs; STAR-FC does
    pairs, scores, n = gold["gcn_pairs"], gold["dec_pair_scores"], len(gold["in_gt"])
    end = len(scores) - len(scores) % 65 if drop else len(scores)
    b = glc.believed_links(pairs[:, :end], scores[:end], n, t1)
    assert same_sets(np.stack(b.nonzero()).T, gold[f"dec_{name}_edges_T1"])
    np.testing.assert_array_equal(np.diff(b.indptr), gold[f"dec_{name}_link_num"])
    i, j = gold[f"dec_{name}_edges_T1"].T
    np.testing.assert_array_equal(np.asarray((b @ b)[i, j]).ravel(), gold[f"dec_{name}_share_num"])
    assert same_sets(np.stack(glc.intimate_links(b, t2, rows=100).nonzero()).T, gold[f"dec_{name}_edges_T2"])
    np.testing.assert_array_equal(glc.decode(pairs, scores, n, t1, t2, drop_tail=drop), gold[f"dec_{name}_relabel"])


@pytest.mark.parametrize("name", SETTINGS)
def test_metrics_of_the_decoded_labels(gold, name):
    for labels, want in [(gold[f"dec_{name}_labels"], "all"), (gold[f"dec_{name}_relabel"], "kept")]:
        q = label_quality(labels, gold["in_gt"])
        ours = [q.pairwise_precision, q.pairwise_recall, q.pairwise_f, q.bcubed_precision, q.bcubed_recall, q.bcubed_f, q.nmi]
        np.testing.assert_allclose(ours, gold[f"dec_{name}_metrics_{want}"], atol=1e-9)


def test_decode_step_by_step():
    "Every rule of the decoding as plain loops."
    rng = np.random.default_rng(3)
    n, pairs = 40, np.array([(i, j) for i in range(40) for j in rng.choice(40, 25, replace=False) if i != j]).T
    scores = np.where(pairs[0] // 8 == pairs[1] // 8, rng.uniform(0.4, 1, pairs.shape[1]), rng.uniform(0, 0.65, pairs.shape[1]))
    kept = {(i, j) for i, j, s in zip(*pairs, scores) if s > 0.6}
    out = [{j for a, j in kept if a == i} for i in range(n)]
    close = [(i, j) for i, j in kept if out[i] and out[j] and max(sum((k, j) in kept for k in out[i]) / len(d) for d in (out[i], out[j])) > 0.3]
    root = list(range(n))
    for _ in range(n):
        for i, j in close: root[i] = root[j] = min(root[i], root[j])
    want, names = [], {}
    for i in range(n): want.append(-1 if root.count(root[i]) < 3 else names.setdefault(root[i], len(names)))
    np.testing.assert_array_equal(glc.decode(pairs, scores, n, 0.6, 0.3, min_size=3), want)
    assert max(want) > 0 and -1 in want


# ----------------------------------------------------------------------------------------------------- corrected labels

QUICK = dict(width=32, k=12, subgraphs=(2, 1), steps=40, device="cpu")


def noisy(seed=0, ids=60, per=12, dim=16, spread=0.8):
    "Features of made identities, the truth, and labels with splits, merges, flips and outliers."
    rng = np.random.default_rng(seed)
    pids = np.repeat(np.arange(ids), per)
    x = (rng.normal(size=(ids, dim))[pids] + spread * rng.normal(size=(len(pids), dim))).astype(np.float32)
    labels, order = pids.copy(), rng.permutation(ids)
    for c in order[:ids // 5]: labels[(pids == c) & (rng.random(len(pids)) < 0.5)] = labels.max() + 1
    for a, b in order[ids // 5:ids // 5 + ids // 8 * 2].reshape(-1, 2): labels[pids == b] = a
    flipped = rng.random(len(pids)) < 0.03
    labels[flipped] = rng.choice(labels, flipped.sum())
    labels[rng.random(len(pids)) < 0.05] = -1
    return x, pids, labels


def test_correction_raises_pairwise_f():
    x, pids, labels = noisy(spread=0.6)
    corrected = glc.correct_labels(x, labels, width=64, k=12, subgraphs=(30, 15), device="cpu")
    before, after = label_quality(labels, pids), label_quality(corrected, pids)
    assert after.pairwise_f > before.pairwise_f + 0.05 and after.images > 0.6 * len(x)
    assert sorted(set(corrected[corrected >= 0])) == list(range(after.clusters))


def test_same_seed_same_labels_and_no_global_generator_touched():
    x, _, labels = noisy(ids=30)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    a, b, c = (glc.correction(torch.from_numpy(x), torch.from_numpy(labels), seed=s, **QUICK).scores for s in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    assert torch.equal(before[0], torch.random.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


@pytest.mark.parametrize("labels, words", [(np.full(40, -1), "0 cluster"), (np.zeros(40, int), "1 cluster"), (np.arange(40) % 2, "0 component"), (np.arange(40), "0 component")])
def test_nothing_to_learn_or_nothing_found_gives_the_labels_back(labels, words):
    x = np.random.default_rng(0).normal(size=(40, 8))
    with pytest.warns(UserWarning, match=words): out = glc.correct_labels(x, labels, **QUICK | dict(t1=0.999))
    np.testing.assert_array_equal(out, labels)


def test_a_giant_component_is_reported_and_refused():
    x, _, labels = noisy(ids=20)
    with pytest.warns(UserWarning, match="one component of"): out = glc.correct_labels(x, labels, **QUICK | dict(t1=0.0, t2=0.0))
    assert (out >= 0).sum() == (labels >= 0).sum() and len(set(out)) == len(set(labels))


def test_odd_input():
    x, _, labels = noisy(ids=12)
    names = np.where(labels < 0, -1, labels * 7 + 3)                       # labels with gaps are fine
    assert np.array_equal(glc.correction(x, names, **QUICK).scores, glc.correction(x, labels, **QUICK).scores)
    assert glc.correction(x[:30], labels[:30], **QUICK | dict(k=50)).pairs.shape == (2, 30 * 29)  # fewer images than k
    with pytest.raises(ValueError, match="one number per image"): glc.correct_labels(x, labels[1:])
    x[3] = np.nan
    with pytest.raises(ValueError, match="NaN"): glc.correct_labels(x, labels)


# ------------------------------------------------------------------------------------------------------------- the plug

FAST = dict(iterations=3, glc_subgraphs=[2, 1], glc_steps=4, glc_width=16)


@pytest.fixture(scope="module")
def tiny(root):
    from reidbook.data import open_dataset
    return open_dataset("synthetic-tiny", root)


def records(t): return [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in t.history]


def run(tiny, method=glc.METHOD, out=None, stop=None, **settings):
    t = training.start(tiny, method, training.resolve(method, tiny.name, **FAST | settings), out=out)
    for r in training.epochs(t):
        if r["epoch"] == stop: break
    return t


def test_schedule_of_the_shipped_script():
    "The table of epochs: corrections, the restart, frozen labels, learning rates."
    s = SimpleNamespace(**training.resolve(glc.METHOD, "msmt17"))
    plug, due, plans = glc.GLC(), [], []
    for e in range(50):
        t = SimpleNamespace(settings=s, epoch=e)
        plans.append(plug.plan(t, training.Plan(1, s.lr * 0.1 ** (e // s.lr_step))))
        if not plans[-1].freeze and plug.due(s, e): due.append(e)
    assert due == [10, 15, 25, 30, 35, 40, 45]
    assert [e for e, p in enumerate(plans) if p.restart] == [15] and [e for e, p in enumerate(plans) if p.freeze] == [16, 17, 18, 19, 20]
    np.testing.assert_allclose([plans[e].lr for e in (0, 14, 15, 29, 30, 44, 45)], [3.5e-4, 3.5e-4, 5.5e-4, 5.5e-4, 5.5e-5, 5.5e-5, 5.5e-6])


def test_schedules_by_direction():
    assert glc.schedule("market1501")["glc_start"] == 5 and training.resolve(glc.METHOD, "market1501")["glc_start"] == 5
    for target, source in [(t, s) for s, t in glc.SCHEDULES]:
        ran = training.resolve(glc.METHOD, target, source=source)
        assert {k: ran[k] for k in glc.GLC.settings} == glc.schedule(target, source)
    assert glc.schedule("market1501", "msmt17")["glc_interval"] == 6 and glc.schedule("market1501", "msmt17")["glc_restart"] == 15
    assert glc.schedule("market1501", kind="restart") | dict(glc_start=-1, glc_restart=20, glc_restart_lr=4e-4, glc_restart_step=10) == glc.schedule("market1501", kind="restart")
    assert glc.schedule("msmt17", kind="glc")["glc_restart"] == -1 and set(glc.schedule("own")) == set(glc.GLC.settings)
    with pytest.raises(ValueError, match="expected both, glc or restart"): glc.schedule("msmt17", kind="all")


def test_restart_trains_a_fresh_network_on_the_old_one_s_labels(tiny):
    t = training.start(tiny, glc.METHOD, training.resolve(glc.METHOD, tiny.name, **FAST | dict(epochs=4, glc_start=1, glc_interval=2, glc_restart=1, glc_freeze=1, glc_restart_lr=5e-3)))
    fresh = {k: v.clone() for k, v in t.model.state_dict().items()}
    seen, steps, start_epoch = [], training.epochs(t), t.method.start_epoch
    def spy(t, feats): seen.append((t.epoch, t.labels, all(torch.equal(v, fresh[k]) for k, v in t.model.state_dict().items()))); start_epoch(t, feats)
    t.method.start_epoch = spy
    with pytest.warns(UserWarning, match="labels unchanged"): records = list(steps)
    assert [new for _, _, new in seen] == [True, True, False, False]                 # fresh at the start and at the restart
    assert np.array_equal(seen[1][1], seen[2][1]) and [r["lr"] for r in records] == [1e-3, 5e-3, 5e-3, 5e-3]
    assert ["raw_label_pairwise_f" in r for r in records] == [False, True, False, True]


def test_resumed_equals_undisturbed(tiny, tmp_path):
    settings = dict(epochs=4, glc_start=1, glc_interval=1, glc_restart=2, glc_freeze=1)
    with pytest.warns(UserWarning, match="labels unchanged"):  # so small a network finds no cluster
        whole = run(tiny, **settings)
        run(tiny, out=tmp_path, stop=3, **settings)
        again = run(tiny, out=tmp_path, **settings)
    assert records(again) == records(whole)


def test_no_correction_is_the_baseline(tiny):
    from reidbook.methods.baseline import Baseline
    t = training.start(tiny, Baseline, training.resolve(Baseline, tiny.name, epochs=2, iterations=3))
    assert list(training.epochs(t)) and records(t) == records(run(tiny, epochs=2, glc_start=-1))


@pytest.mark.parametrize("name", ["baseline", "pplr", "purification"])
def test_the_plug_corrects_any_method(tiny, name, monkeypatch):
    method = pytest.importorskip(f"reidbook.methods.{name}").METHOD
    seen = []
    def corrected(features, labels, **settings):
        seen.append(labels)
        return SimpleNamespace(labels=np.where(labels > 0, labels - 1, -1), largest=0, note="")  # the first cluster is dropped
    monkeypatch.setattr(glc, "correction", corrected)
    t = training.start(tiny, method, training.resolve(method, tiny.name, correct="glc", epochs=2, iterations=2, glc_start=1, glc_interval=1))
    record = list(training.epochs(t))[-1]
    assert record["raw_clusters"] == record["clusters"] + 1 and np.array_equal(t.labels, np.where(seen[-1] > 0, seen[-1] - 1, -1))


def test_run_through_papermill(root, tmp_path, monkeypatch):
    import json
    from reidbook import runs
    monkeypatch.setattr(runs, "runs_dir", lambda: tmp_path / "runs")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    out = runs.execute("synthetic-tiny", "glc", root=root, settings=dict(epochs=3, iterations=6, glc_start=1, glc_interval=1))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["status"] == "done" and manifest["metrics"]["mAP"] > 0
    assert ["largest" in json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] == [False, True, True]
