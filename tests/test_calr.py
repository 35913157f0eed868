"CALR, the switches of ICSR: the reference implementation's numbers, corner cases, and runs."
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose

from reidbook import runs, training
from reidbook.data import open_dataset
from reidbook.memory import ClusterMemory
from reidbook.methods.icsr import CALR, camera_loss, cluster_weights, ICSR, reverse_gradient, weighted_loss

SHORT = dict(epochs=2, iterations=2, eval_every=2, camera_epochs=1, camera_iterations=1)


@pytest.fixture(scope="module")
def g(golden): return golden("next_calr")


def relative(got, want): return np.abs(got - want).max() / np.abs(want).max()


# -- golden ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gap", ["", "_gap"])
def test_golden_weights(g, gap):
    weights = cluster_weights(g["in_labels" + gap], g["in_cams"])
    assert_allclose(weights, g["out_weights" + gap], atol=1e-6)
    assert (weights == 0).sum() == 2 or gap


@pytest.mark.parametrize("kind", ["plain", "weighted"])
def test_golden_loss(g, kind):
    args = json.loads(str(g["args"]))
    x, w = torch.tensor(g["in_features"], requires_grad=True), g["out_weights"] if kind == "weighted" else np.ones(14, np.float32)
    loss = weighted_loss(x, g["in_targets"], g["in_memory"], w, args["temperature"])
    assert_allclose(loss.item(), g[f"out_{kind}_loss"], atol=1e-5)
    loss.backward()
    assert relative(x.grad.numpy(), g[f"out_{kind}_grad"]) < 1e-4
    memory = ClusterMemory(g["in_memory"], args["momentum"])
    memory.update(x.detach(), g["in_targets"])
    assert_allclose(memory.prototypes, g[f"out_{kind}_memory"], atol=2e-6)


@pytest.mark.parametrize("key, compat", [("", True), ("_meant", False)])
def test_golden_camera_loss(g, key, compat):
    x = torch.tensor(g["in_camera_logits"], requires_grad=True)
    loss = camera_loss(x, g["in_camera_targets"], compat=compat)
    assert_allclose(loss.item(), g[f"out_camera_loss{key}"], atol=1e-5)
    loss.backward()
    assert relative(x.grad.numpy(), g[f"out_camera_grad{key}"]) < 1e-4


def test_golden_reversal(g):
    x = torch.zeros(5, 4, requires_grad=True)
    reverse_gradient(x).backward(torch.tensor(g["in_reverse_up"]))
    assert (x.grad.numpy() == g["out_reverse_grad"]).all()


# -- corners --------------------------------------------------------------------------------------------------------------------
def test_weights_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    labels, cams = rng.integers(-1, 6, 80), rng.choice([-3, 5, 9], 80)
    for c, w in enumerate(cluster_weights(labels, cams)):
        p = np.unique(cams[labels == c], return_counts=True)[1] / (labels == c).sum()
        assert_allclose(w, np.log(1 - (p * np.log(p)).sum()), atol=1e-6)
    assert cluster_weights([], []).shape == (0,) and cluster_weights([-1, -1], [0, 1]).shape == (0,)


def test_a_batch_without_weight_is_nothing():
    x = torch.randn(4, 3, requires_grad=True)
    loss = weighted_loss(x, [0, 0, 1, 1], np.eye(2, 3), [0., 0.])
    loss.backward()
    assert loss == 0 and (x.grad == 0).all()


def test_refused():
    x, m = np.eye(3, 4), np.eye(3, 4)
    with pytest.raises(ValueError, match="cams"): cluster_weights([0, 1], [0])
    with pytest.raises(ValueError, match="expected one for each of the 3 prototypes"): weighted_loss(x, [0, 1, 2], m, [1., 1.])
    with pytest.raises(ValueError, match="same width"): weighted_loss(x[:, :3], [0, 1, 2], m, np.ones(3))
    with pytest.raises(ValueError, match="cams"): camera_loss(x, [0, 1, 4])


# -- runs -----------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny(root): return open_dataset("synthetic-tiny", root)


def run(tiny, method, store, **given):
    t = training.start(tiny, method, training.resolve(method, tiny.name, **SHORT | given), seed=1, store=store)
    return t, [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in training.epochs(t)]


def test_both_switches_off_are_icsr_to_the_digit(tiny, tmp_path):
    assert run(tiny, CALR, tmp_path)[1] == run(tiny, ICSR, tmp_path)[1]
    assert runs.get_method("icsr") is CALR


def test_head_and_weights_act_when_they_should(tiny, tmp_path):
    t, (first, second) = run(tiny, CALR, tmp_path, camera_head=True, camera_head_epochs=1, cluster_weights="entropy", weights_from=1)
    assert "camera" in first and "camera" not in second
    assert "images_without_weight" not in first and 0 <= second["images_without_weight"] < 1
    assert any(p is q for group in t.optimizer.param_groups for p in group["params"] for q in t.model.classifier.parameters())


def test_the_head_learns_and_the_features_unlearn(tiny, tmp_path):
    "One step of plain gradient descent: the head's loss falls for the head, and rises for the features."
    t, _ = run(tiny, CALR, tmp_path, camera_head=True, epochs=1)
    head = t.model.classifier.eval()
    x, cams = F.normalize(torch.randn(32, head[0].in_features), dim=1).requires_grad_(), torch.arange(32) % head[-1].out_features
    loss = camera_loss(head(reverse_gradient(x)), cams)
    loss.backward()
    with torch.no_grad():
        assert camera_loss(head(x - 0.1 * x.grad), cams) > loss
        for p in head.parameters(): p -= 0.01 * p.grad
        assert camera_loss(head(x), cams) < loss


def test_a_run_with_a_head_goes_on_and_gives_its_weights_away(tiny, tmp_path):
    given = dict(camera_head=True, cluster_weights="entropy", weights_from=1)
    whole = run(tiny, CALR, tmp_path / "store", **given)[1]
    settings = training.resolve(CALR, tiny.name, **SHORT | given)
    t = training.start(tiny, CALR, settings, seed=1, out=tmp_path / "run", store=tmp_path / "store")
    next(training.epochs(t))
    again = training.start(tiny, CALR, settings, seed=1, out=tmp_path / "run", store=tmp_path / "store")
    assert again.epoch == 1
    list(training.epochs(again))
    assert [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in again.history] == whole
    weights = tmp_path / "weights.pt"
    torch.save(again.model.state_dict(), weights)
    training.start(tiny, ICSR, training.resolve(ICSR, tiny.name, **SHORT | dict(weights=str(weights))), seed=1, store=tmp_path / "store")
