"NCPLR: the reference implementation's numbers, its corner cases, and both forms as runs."
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from numpy.testing import assert_allclose, assert_array_equal

from reidbook import training
from reidbook.cli import main
from reidbook.clustering import dbscan
from reidbook.data import open_dataset
from reidbook.memory import ClusterMemory
from reidbook.methods.ncplr import NCPLR, mutual_targets, neighbor_votes, neighbor_weights, refined_loss, refined_targets, weigh
from reidbook.neighbors import fuse_similarities, jaccard_similarity

HEADS = "gud"


@pytest.fixture(scope="module")
def g(golden): return golden("next_ncplr")


@pytest.fixture(scope="module")
def index(g): return g["in_kept"][g["in_index"]]


def relative(got, want): return np.abs(got - want).max() / np.abs(want).max()
def graph(distance): return sp.csr_matrix(1 - distance)


# -- golden ---------------------------------------------------------------------------------------------------------------------
def test_golden_similarity_and_labels(g):
    sims = [jaccard_similarity(g[f"in_features_{h}"], 30, 6) for h in HEADS]
    assert_allclose(1 - sims[0].toarray(), g["out_jaccard_g"], atol=2e-6)
    fused = fuse_similarities(sims, [.6, .2, .2])
    assert sp.issparse(fused) and fused.format == "csr"
    assert_allclose(1 - fused.toarray(), g["out_fused"], atol=2e-6)
    assert_array_equal(dbscan(fused, .5, 4), g["out_labels"])


@pytest.mark.parametrize("number, weighting", list(enumerate(("equal", "far"))))
def test_golden_votes_targets_loss_and_gradient(g, index, number, weighting):
    logits = torch.tensor(g["in_logits_g"], requires_grad=True)
    votes = neighbor_votes(logits, index, graph(g["out_jaccard_g"]), weighting=weighting)
    assert not votes.requires_grad
    assert_allclose(votes, g[f"out_vote{number}"], atol=2e-6)
    targets = refined_targets(votes, g["in_targets"], .1)
    assert_allclose(targets, g[f"out_target{number}"], atol=2e-6)
    loss = refined_loss(logits, targets)
    assert_allclose(loss.item(), g[f"out_loss{number}"], atol=1e-5)
    loss.backward()
    assert relative(logits.grad.numpy(), g[f"out_grad{number}"]) < 1e-4


def test_golden_near_is_the_default(g, index):
    assert_allclose(neighbor_votes(g["in_logits_g"], index, graph(g["out_jaccard_g"])), g["out_vote_near"], atol=2e-6)


def test_golden_part_form(g, index):
    logits = {h: torch.tensor(g[f"in_logits_{h}"], requires_grad=True) for h in HEADS}
    votes = {h: neighbor_votes(logits[h], index, graph(g["out_fused"]), weighting="far") for h in HEADS}
    for h in HEADS: assert_allclose(votes[h], g[f"out_gl_vote_{h}"], atol=3e-6)
    whole, parts = mutual_targets(votes["g"], torch.stack([votes["u"], votes["d"]], 1), g["in_targets"])
    targets = dict(zip(HEADS, (whole, parts[:, 0], parts[:, 1])))
    for h in HEADS: assert_allclose(targets[h], g[f"out_gl_target_{h}"], atol=3e-6)
    loss = weigh([refined_loss(logits[h], targets[h]) for h in HEADS], .2)
    assert_allclose(loss.item(), g["out_gl_loss"], atol=1e-5)
    loss.backward()
    for h in HEADS: assert relative(logits[h].grad.numpy(), g[f"out_gl_grad_{h}"]) < 1e-4


def test_golden_memories(g):
    banks = [ClusterMemory(g[f"in_memory_{h}"], .1, .05) for h in HEADS]
    feats = [torch.tensor(g[f"in_batch_{h}"], requires_grad=True) for h in HEADS]
    loss = weigh([bank(f, g["in_targets"]) for bank, f in zip(banks, feats)], .2)
    assert_allclose(loss.item(), g["out_gl_memory_loss"], atol=1e-5)
    loss.backward()
    for h, bank, f in zip(HEADS, banks, feats):
        assert relative(f.grad.numpy(), g[f"out_gl_memory_grad_{h}"]) < 1e-4
        bank.update(f, g["in_targets"])
        assert_allclose(bank.prototypes, g[f"out_gl_memory_{h}"], atol=2e-6)


# -- votes against two loops ----------------------------------------------------------------------------------------------------
def by_loop(probabilities, index, similarity, least, sign):
    out = []
    for i in index:
        seen, weights, rows = set(), [], []
        for place, j in enumerate(index):
            if j in seen: continue
            seen.add(j)
            s = 1.0 if i == j else similarity[i, j]
            if s >= least - 1e-5: weights.append(np.exp(sign * s)); rows.append(probabilities[place])
        out.append(np.average(rows, 0, weights))
    return np.array(out)


@pytest.mark.parametrize("weighting, sign", [("near", 1), ("equal", 0), ("far", -1)])
@pytest.mark.parametrize("seed", range(5))
def test_votes_against_a_loop(weighting, sign, seed):
    rng = np.random.default_rng(seed)
    x = rng.random((30, 30))
    similarity = np.where(x + x.T > .9, (x + x.T) / 2, 0)  # without ones on the diagonal
    index = rng.integers(0, 30, 20)
    logits = rng.normal(size=(20, 4))
    p = torch.tensor(logits).softmax(1).numpy()
    for s in similarity, sp.csr_matrix(similarity):
        got = neighbor_votes(logits, index, s, .6, weighting=weighting)
        assert_allclose(got, by_loop(p, index, similarity, .6, sign), atol=1e-6)


def test_the_tie_rule_and_the_image_itself():
    s = np.array([[0, .799995, .79], [.799995, 0, 0], [.79, 0, 0]])
    w = neighbor_weights([0, 1, 2], s, .8, weighting="equal")
    assert_allclose(w, [[.5, .5, 0], [.5, .5, 0], [0, 0, 1]])


def test_refused():
    with pytest.raises(ValueError, match="one of near, equal, far"): neighbor_weights([0], np.eye(2), weighting="close")
    with pytest.raises(ValueError, match="index: found 2, expected 0 to 1"): neighbor_weights([2], np.eye(2))
    with pytest.raises(ValueError, match="alpha"): refined_targets(np.eye(2), [0, 1], 2)
    with pytest.raises(ValueError, match="B x C for both"): refined_loss(np.eye(2), np.eye(3))
    with pytest.raises(ValueError, match="B x P x C"): mutual_targets(np.eye(2), np.eye(2), [0, 1])
    for wrong in ([1], [1, -1], [1, 1, 1]):
        with pytest.raises(ValueError, match="weight"): fuse_similarities([np.eye(2)] * 2, wrong)
    with pytest.raises(ValueError, match="same images"): fuse_similarities([np.eye(2), np.eye(3)], [1, 1])
    with pytest.raises(ValueError, match="array and sparse"): fuse_similarities([np.eye(2), sp.eye(2).tocsr()], [1, 1])


def test_a_vote_without_a_doubt_is_a_number():
    "Softmax can reach 0 and 1; agreement then is 0 or 1, not NaN."
    sure = torch.eye(2)
    whole, parts = mutual_targets(sure, torch.stack([sure, sure.flip(0)], 1), [0, 1])
    assert torch.isfinite(whole).all() and torch.isfinite(parts).all()
    assert_allclose(whole, sure)
    assert_allclose(parts[:, 1], .3 * sure + .7 * sure.flip(0))


# -- runs -----------------------------------------------------------------------------------------------------------------------
def run(tiny, out=None, stop=None, **given):
    settings = training.resolve(NCPLR, tiny.name, **dict(epochs=2, iterations=3, batch_size=16, eval_every=9) | given)
    t = training.start(tiny, NCPLR, settings, seed=1, out=out)
    for r in training.epochs(t):
        if r["epoch"] == stop: break
    return t


def records(t): return [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in t.history]


@pytest.fixture(scope="module")
def tiny(root): return open_dataset("synthetic-tiny", root)


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("rows", [0, 40])
def test_a_resumed_run_equals_an_undisturbed_one(tiny, tmp_path, parts, rows):
    whole = run(tiny, parts=parts, rows=rows)
    assert len(whole.method.memories) == 1 + 2 * parts and len(whole.optimizer.param_groups) == 1
    assert all(0 <= r["company"] <= 1 for r in whole.history)
    run(tiny, tmp_path, stop=1, parts=parts, rows=rows)
    assert records(run(tiny, tmp_path, parts=parts, rows=rows)) == records(whole)


def test_settings_reach_the_loss(tiny):
    plain = records(run(tiny, parts=True, epochs=1, neighbor_eps=.5))
    for name, value in dict(alpha=1.0, part_alpha=1.0, lambda1=.1, lambda2=.4, weighting="far", agreement_temperature=.1, neighbor_eps=.0).items():
        assert records(run(tiny, **dict(parts=True, epochs=1, neighbor_eps=.5) | {name: value})) != plain, name


def test_kept_labels_keep_their_neighbours(tiny):
    "Labels of another start are held for epochs without `labels`; the neighbours are then found again."
    t = run(tiny, start="histogram", parts=True)
    assert len(t.history) == 2 and t.method.graph is None


def test_command_line(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("REIDBOOK_RUNS", str(tmp_path))
    main(f"run --dataset synthetic-tiny --method ncplr --root {root} -p epochs=1 -p iterations=2 -p batch_size=16 -p parts=true".split())
    assert "mAP" in capsys.readouterr().out and list(tmp_path.glob("synthetic-tiny-ncplr-s1-*"))
