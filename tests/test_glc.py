"GLC: the released network, training and decoding step for step; corrected labels on made noise; the plug in the loop."
import warnings

import numpy as np
import pytest
import torch

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
    inputs, edges, same = training_set
    loss = glc.focal_loss(glc.pair_logits(net, glc.nodes(net, inputs), edges), same, gamma)
    loss.backward()
    assert abs(loss.item() - gold[f"train_{name}_loss"]) < 1e-6
    for ours, want in [(net["gcn.weight"].grad[:, ::8], "conv_w"), (net["pair.weight"].grad[:4], "head0_w"), (net["pair.slope"].grad, "prelu")]:
        want = gold[f"train_{name}_grad_{want}"]
        np.testing.assert_allclose(ours, want, atol=1e-5 * np.abs(want).max())


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
