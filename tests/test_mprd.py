"MPRD against the released code's own numbers, and against slow, obvious recomputations."
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from reidbook import runs, training
from reidbook.memory import ClusterMemory
from reidbook.methods import mprd
from reidbook.methods.baseline import Baseline

NAMES = {"gnn.conv_params.0": "graph.0", "gnn.conv_params.1": "graph.1", "gnn.conv_params.2": "graph.2", "gnn.conv1d_params1": "conv1",
         "gnn.conv1d_params2": "conv2", "mlp.h1_weights": "fc1", "mlp.h2_weights": "fc2"}


@pytest.fixture(scope="module")
def g(golden): return golden("mprd")


def ragged(g, key):
    "Rows of a padded list as index arrays."
    return [row[:n] for row, n in zip(g[key], g[key + ".len"])]


def weights(g, prefix):
    "The released network's tensors under our names."
    out = {}
    for theirs, ours in NAMES.items():
        for part in ("weight", "bias"):
            w = torch.from_numpy(np.atleast_1d(g[f"{prefix}.{theirs}.{part}"]))
            out[f"{ours}.{part}"] = w[:, 0] if theirs == "gnn.conv1d_params1" and part == "weight" else w
    return out


def network(g, prefix="w"):
    gcn = mprd.PairGCN(32, widths=(16, 12, 20, 16)).eval()
    gcn.load_state_dict(weights(g, prefix))
    return gcn


def tensors(g, *keys): return [torch.from_numpy(g[k]).clone() for k in keys]


def graphs_of(g, pairs, compat=True):
    memory, = tensors(g, "in.features")
    lists = mprd.top_lists(memory, compat=compat)
    left, right = torch.as_tensor(pairs).T
    return mprd.pair_graphs(lists[left], lists[right], compat)


def check_graphs(graphs, g, key):
    for e, (nodes, labels) in enumerate(zip(ragged(g, f"{key}.nodes"), ragged(g, f"{key}.labels"))):
        n = len(nodes)
        assert graphs.filled[e].sum() == n and graphs.filled[e, :n].all()
        assert np.array_equal(graphs.nodes[e, :n], nodes) and np.array_equal(graphs.labels[e, :n], labels)
        adj = g[f"{key}.adj"][e][:n, :n].copy()
        assert np.array_equal(graphs.adj[e, :n, :n], adj)
        assert graphs.adj[e, n:].sum() == 0


# label flips

def slow_flips(now, before):
    n = range(len(now))
    return ([[j for j in n if now[j] == now[i] and before[j] != before[i]] for i in n],
            [[j for j in n if now[j] != now[i] and before[j] == before[i]] for i in n])


@pytest.mark.parametrize("previous, key", [("in.label_prior", "hard"), (None, "hard0")])
def test_flips_golden(g, previous, key):
    became, apart = mprd.label_flips(g["in.label_cur"], None if previous is None else g[previous])
    for mine, theirs in ((became, f"{key}.pos"), (apart, f"{key}.neg")):
        assert all(np.array_equal(a, b) for a, b in zip(mine, ragged(g, theirs), strict=True))


def test_flips_with_outliers_written_as_minus_one(g):
    for a, b in zip(mprd.label_flips(g["in.label_cur_raw"], g["in.label_prior_raw"]), mprd.label_flips(g["in.label_cur"], g["in.label_prior"])):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_flips_slow():
    rng = np.random.default_rng(0)
    for _ in range(20):
        now, before = rng.integers(0, 6, (2, 40))
        for mine, theirs in zip(mprd.label_flips(torch.from_numpy(now), before), slow_flips(now, before)):
            assert [x.tolist() for x in mine] == theirs
    now, before = np.array([0, 0, -1, -1]), np.array([-1, -1, 1, 1])
    became, apart = mprd.label_flips(now, before)
    assert [x.tolist() for x in became] == [[1], [0], [], []] and [x.tolist() for x in apart] == [[], [], [3], [2]]
    with pytest.raises(ValueError, match="same images"): mprd.label_flips(now, before[:3])


# graphs and network

def test_released_graphs(g): check_graphs(graphs_of(g, g["in.pairs"]), g, "link2graph")


def test_anchored_labels(g):
    graphs = graphs_of(g, g["in.pairs"], compat=False)
    for e, (nodes, labels) in enumerate(zip(ragged(g, "link2graph.anchored_nodes"), ragged(g, "link2graph.anchored_labels"))):
        mine = {int(n): int(y) for n, y, f in zip(graphs.nodes[e], graphs.labels[e], graphs.filled[e]) if f}
        assert mine == dict(zip(nodes.tolist(), labels.tolist()))


def test_released_network(g):
    graphs, gcn, (memory, y) = graphs_of(g, g["in.pairs"]), network(g), tensors(g, "in.features", "in.pair_y")
    k = mprd.released_k(graphs)
    assert k == g["gcn.sortpool_k"]
    assert np.allclose(gcn.embed(graphs, memory, k).detach(), g["gcn.embed"], atol=1e-5)
    out = gcn(graphs, memory, k)
    assert np.allclose(out.detach().exp(), g["gcn.prob"], atol=1e-5)
    loss = F.nll_loss(out, y)
    assert abs(loss.item() - g["gcn.nll"]) < 1e-6
    loss.backward()
    theirs = weights(g, "gcn.grad")
    for name, p in gcn.named_parameters(): assert torch.allclose(p.grad, theirs[name], rtol=1e-5, atol=1e-7), name


def test_anchored_network(g):
    graphs, (memory,) = graphs_of(g, g["in.pairs"], compat=False), tensors(g, "in.features")
    assert np.allclose(network(g)(graphs, memory).detach().exp(), g["gcn.anchored.prob"], atol=1e-5)


def test_an_empty_slot_changes_nothing(g):
    "Graphs computed one by one, at their own size, give what the padded batch gives."
    graphs, (memory,), gcn = graphs_of(g, g["in.pairs"], compat=False), tensors(g, "in.features"), network(g)
    together = gcn(graphs, memory)
    for e in range(len(together)):
        f = graphs.filled[e]
        alone = mprd.PairGraphs(graphs.nodes[e:e + 1, f], f[f][None], graphs.adj[e:e + 1, f][:, :, f], graphs.labels[e:e + 1, f])
        pad = 16 - int(f.sum())
        alone = mprd.PairGraphs(F.pad(alone.nodes, (0, pad), value=5), F.pad(alone.filled, (0, pad)), F.pad(alone.adj, (0, pad, 0, pad)), F.pad(alone.labels, (0, pad), value=3))
        assert torch.allclose(gcn(alone, memory), together[e:e + 1], atol=1e-6)


def test_the_order_of_a_pair_does_not_matter(g):
    memory, = tensors(g, "in.features")
    pairs = g["in.pairs"]
    assert np.allclose(mprd.same_person(network(g), memory, pairs), mprd.same_person(network(g), memory, pairs[:, ::-1].copy(), batch_size=5), atol=1e-6)


def test_released_pretraining_graphs(g):
    memory, views = tensors(g, "in.features", "in.aug_features")
    batch = g["in.pretrain_batch"]
    views = views[batch] if len(views) == len(memory) else views
    left = mprd.top_lists(memory, views, own=batch, compat=True)
    right = mprd.top_lists(memory, compat=True)
    check_graphs(mprd.pair_graphs(left, right[batch], True), g, "pretrain_pos")
    check_graphs(mprd.pair_graphs(left, right[g["pretrain.hard_negative"]], True), g, "pretrain_neg")


def test_released_meta_graphs(g):
    meta, = tensors(g, "in.meta")
    lists = mprd.top_lists(meta, compat=True) + 96
    for sign in ("pos", "neg"):
        graphs = mprd.pair_graphs(*(lists[g[f"meta.{sign}_pair"][:, side] - 96] for side in (0, 1)), True)
        for e, edges in enumerate(ragged(g, f"meta.{sign}_edges")):
            assert set(graphs.nodes[e][graphs.filled[e]].tolist()) == set(edges.tolist()) | set(g[f"meta.{sign}_pair"][e].tolist())


def test_released_reptile(g):
    gcn, (memory, y) = network(g), tensors(g, "in.features", "in.reptile_y")
    carry = None
    for rows in (slice(0, 128), slice(128, 256)):
        carry = mprd.released_reptile_step(gcn, graphs_of(g, g["in.reptile_pairs"][rows]), memory, y[rows], carry)
    theirs = weights(g, "reptile.after")
    for name, p in gcn.named_parameters(): assert torch.allclose(p, theirs[name], rtol=1e-5, atol=1e-6), name


# losses

MODES = pytest.mark.parametrize("mode", ["nogcn", "gcn"])


def batch_of(g, mode):
    f, y, c, m = tensors(g, "in.f_out", "in.batch_tgt", "in.proto", "in.features")
    draws = ragged(g, f"{mode}.choice_log")
    drawn = np.concatenate(draws if mode == "nogcn" else draws[::3])
    return f, y, c, m, m[drawn], ragged(g, f"{mode}.batch_pos"), ragged(g, f"{mode}.batch_neg")


@MODES
def test_mixing(g, mode):
    f, y, c, m, drawn, *_ = batch_of(g, mode)
    mixed = mprd.mixed_prototypes(c, drawn, y)
    slow = c.clone()
    for row, k in zip(drawn, y): slow[k] = 0.2 * row + 0.8 * slow[k]
    assert torch.allclose(mixed, slow, atol=1e-6)
    assert np.allclose(mixed, g[f"{mode}.pos_protomemory"], atol=1e-6)


@MODES
@pytest.mark.parametrize("compat", [False, True])
def test_mining_loss(g, mode, compat):
    f, y, c, m, drawn, _, negatives = batch_of(g, mode)
    f.requires_grad_()
    loss = mprd.mining_loss(f, y, c, mprd.mixed_prototypes(c, drawn, y), negatives, m, compat=compat)
    assert abs(loss.item() - g[f"{mode}.loss_mh"]) < 1e-6
    loss.backward()
    theirs = g[f"{mode}.loss_mh_grad_{'asrun' if compat else 'exact'}"]
    assert np.abs(f.grad.numpy() - theirs).max() < 1e-5 * np.abs(theirs).max()


@MODES
def test_memories_after(g, mode):
    f, y, c, m, *_ = batch_of(g, mode)
    memory = ClusterMemory(c, 0.1, update="hard")
    memory.update(f, y)
    assert np.allclose(memory.prototypes, g[f"{mode}.memory_after"], atol=1e-6)
    mprd.write_rows(m, f, g["in.batch_idx"])
    assert np.allclose(m, g[f"{mode}.extracted_after"], atol=1e-6)


@MODES
def test_alignment(g, mode):
    f, y, c, before, _, positives, negatives = batch_of(g, mode)
    f_hat, after = tensors(g, "in.f_hat", f"{mode}.extracted_after")
    for x in (f, f_hat): x.requires_grad_()
    q, r = (mprd.aligned_prototypes(c, x, y, positives, negatives, g["in.label_cur"], after, before[np.concatenate(negatives)]) for x in (f, f_hat))
    assert np.allclose(q, g[f"{mode}.re_query_memory"], atol=1e-6) and np.allclose(r, g[f"{mode}.re_positive_memory"], atol=1e-6)
    loss = mprd.alignment_loss(f, f_hat, q, r)
    assert abs(loss.item() - g[f"{mode}.loss_kl"]) < 1e-6
    loss.backward()
    for x, name in ((f, "f_out"), (f_hat, "f_hat")):
        theirs = g[f"{mode}.kl_grad_{name}"]
        assert np.abs(x.grad.numpy() - theirs).max() < 1e-5 * np.abs(theirs).max()


def test_collected_pairs(g):
    draws, pairs = ragged(g, "gcn.choice_log"), g["gcn.collected_pairs"]
    f, y, c, m, _, positives, negatives = batch_of(g, "gcn")
    anchors = np.concatenate(draws[2::3])
    assert np.array_equal(np.stack(draws[1::3]), pairs[::2, :2])
    assert np.array_equal(mprd.partner_of(anchors, negatives, g["in.batch_idx"], g["in.batch_tgt"], m), pairs[1::2, 1])


# the method

@pytest.fixture(scope="module")
def tiny(root):
    from reidbook.data import open_dataset
    from reidbook.synthetic import make
    make("synthetic-tiny", root)
    return open_dataset("synthetic-tiny", root)


SHORT = dict(epochs=2, iterations=3)
REFEREE = dict(gcn_width=16)


@pytest.fixture(scope="module")
def store(tmp_path_factory): return tmp_path_factory.mktemp("stages")


def trained(tiny, method=mprd.MPRD, store=None, **given):
    t = training.start(tiny, method, training.resolve(method, tiny.name, **given), store=store)
    return t, list(training.epochs(t))


def test_without_its_parts_it_is_cluster_contrast_with_the_hardest_update(tiny):
    off = dict(alpha=0.0, negative_weight=0.0, alignment_weight=0.0, use_gcn=False)
    a, mine = trained(tiny, **SHORT, **off)
    b, base = trained(tiny, Baseline, **SHORT, update="hard")
    assert [r["loss"] for r in mine] == pytest.approx([r["loss"] for r in base], abs=1e-4)
    assert np.array_equal(a.labels, b.labels)
    p, q = (torch.nn.utils.parameters_to_vector(t.model.parameters()) for t in (a, b))
    assert (p - q).abs().mean() < 1e-6 and (p - q).abs().max() < 1e-3  # Adam turns rounding into steps of up to lr where a gradient is almost zero
    _, r = trained(tiny, **SHORT | dict(epochs=1), **off | dict(alpha=0.2))
    assert abs(r[0]["loss"] - base[0]["loss"]) > 1e-3


@pytest.fixture(scope="module")
def whole(tiny, store): return trained(tiny, store=store, **SHORT, **REFEREE)


def test_the_referee_strikes_out_and_learns(tiny, whole, store):
    t, records = whole
    assert records[0]["flips_apart"] == 0 and all(r[f"kept_{k}"] <= r[f"flips_{k}"] for r in records for k in ("together", "apart"))
    assert 0 < records[0]["kept_together"] < records[0]["flips_together"]
    assert any(not torch.equal(v, t.method.pretrained[k]) for k, v in t.method.gcn.state_dict().items())
    assert len(list(store.glob("gcn-*/result.pt"))) == 1
    frozen, _ = trained(tiny, store=store, **SHORT | dict(epochs=1), **REFEREE, gcn_online=False)
    assert len(list(store.iterdir())) == 1  # the pre-training does not depend on it, and was found again
    assert all(torch.equal(v, frozen.method.pretrained[k]) for k, v in frozen.method.gcn.state_dict().items())


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tiny, whole, store, tmp_path):
    settings, (whole, records) = training.resolve(mprd.MPRD, tiny.name, **SHORT, **REFEREE), whole
    t = training.start(tiny, mprd.MPRD, settings, out=tmp_path, store=store)
    next(training.epochs(t))
    again = training.start(tiny, mprd.MPRD, settings, out=tmp_path, store=store)
    second = next(training.epochs(again))
    assert second["loss"] == pytest.approx(records[1]["loss"], abs=1e-4) and second["flips_apart"] == records[1]["flips_apart"]
    for p, q in zip(whole.method.gcn.parameters(), again.method.gcn.parameters()): assert torch.allclose(p, q, atol=1e-4)


def test_compat_forgets_the_referee_and_takes_the_cluster_next_door(tiny):
    t, _ = trained(tiny, **SHORT | dict(epochs=1, iterations=2), gcn_width=8, gcn_passes=1, compat=True)
    method = t.method
    t.plan, t.epoch = None, 1
    method.gcn.fc2.bias.data += 1
    method.start_epoch(t, training.extract_features(t.model, t.images))
    assert all(torch.equal(v, method.pretrained[k]) for k, v in method.gcn.state_dict().items())
    method.flips = [[np.zeros(0, np.int64)] * len(t.labels)] * 2
    index = np.array([np.flatnonzero(t.labels == y)[0] for y in (0, 1)])
    for compat in (True, False):
        t.settings = t.settings | {"compat": compat}
        assert [p.tolist() for p in method.hard_pairs(t, index)[0]] == [method.mates[i - compat].tolist() for i in index]


def test_judged_asks_each_pair_once_and_keeps_what_is_believed(g, monkeypatch):
    memory, = tensors(g, "in.features")
    asked = []
    def close(gcn, memory, pairs, compat=False): asked.append(len(pairs)); return (np.abs(pairs[:, 0] - pairs[:, 1]) < 3).astype(float)
    monkeypatch.setattr(mprd, "same_person", close)
    lists = [np.array([1, 5]), np.array([0, 2]), np.zeros(0, np.int64)]
    assert [x.tolist() for x in mprd.judged(None, memory, np.array([0, 1, 7]), lists, True)] == [[1], [0, 2], []]
    assert [x.tolist() for x in mprd.judged(None, memory, np.array([0, 1, 7]), lists, False)] == [[5], [], []]
    assert asked == [3, 3]  # 0-1, 0-5 and 1-2


def test_rows_of_the_memory_keep_the_last_copy():
    memory, f = torch.zeros(4, 2), torch.tensor([[1.0, 0], [0, 1], [0, -1]])
    mprd.write_rows(memory, f, np.array([2, 0, 2]))
    assert memory.tolist() == [[0, 1], [0, 0], [0, -1], [0, 0]]


@pytest.mark.parametrize("use_gcn", [True, False])
def test_papermill_run(root, tmp_path, monkeypatch, use_gcn):
    monkeypatch.setattr(runs, "runs_dir", lambda: tmp_path)
    out = runs.execute("synthetic-tiny", "mprd", root=root, settings=dict(use_gcn=use_gcn, epochs=2, iterations=2))
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["epoch"] == 2 and 0 < last["mAP"] <= 1 and ("kept_apart" in last) == use_gcn


def test_alignment_has_a_temperature_of_its_own():
    settings = lambda dataset, **given: training.resolve(mprd.MPRD, dataset, **given)
    assert settings("market1501")["alignment_temperature"] == settings("synthetic-large")["alignment_temperature"] == 0.05  # as released
    assert settings("market1501", temperature=0.2)["alignment_temperature"] == 0.05
    for rendered in ("synthetic", "synthetic-tiny", "synthetic-cameras"):  # as the committed runs had it
        assert settings(rendered)["alignment_temperature"] == settings(rendered)["temperature"] == 0.1
