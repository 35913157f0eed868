"ISE: the reference implementation's numbers, loops as an oracle, corner cases, and runs."
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose, assert_array_equal

from reidbook import training
from reidbook.cli import main
from reidbook.data import open_dataset
from reidbook.memory import ClusterMemory
from reidbook.methods.baseline import Baseline
from reidbook.methods.ise import ISE, label_preserving_loss, strength, support_samples

LAYOUTS = "groups", "single", "twice"


@pytest.fixture(scope="module")
def g(golden): return golden("next_ise")


@pytest.fixture(scope="module")
def args(g): return json.loads(str(g["args"]))


def relative(got, want): return np.abs(got - want).max() / np.abs(want).max()


def batch(g, args, layout):
    "Features with gradient, labels, supports."
    steps = args["steps"][layout]
    x, y = torch.tensor(g[f"in_{layout}_features"], requires_grad=True), g[f"in_{layout}_labels"]
    return x, y, *support_samples(x, y, g["in_memory"], strength(steps["step"], steps["total"]))


# -- golden ---------------------------------------------------------------------------------------------------------------------
def test_golden_strengths(g):
    assert_allclose([strength(step, 28000) for step in g["in_steps"]], g["out_strengths"], atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_golden_supports(g, args, layout):
    assert_allclose(strength(**{k if k == "step" else "total_steps": v for k, v in args["steps"][layout].items()}), g[f"out_{layout}_strength"], atol=1e-6)
    x, y, u, nearest = batch(g, args, layout)
    assert u.requires_grad and not nearest.requires_grad
    assert_array_equal(nearest, g[f"out_{layout}_nearest"])
    assert_allclose(u.detach(), g[f"out_{layout}_support"], atol=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_golden_label_preserving_loss(g, args, layout):
    x, y, u, _ = batch(g, args, layout)
    assert_allclose(label_preserving_loss(x, u, y, args["lp_temperature"]).item(), g[f"out_{layout}_lp_meant"], atol=1e-5)
    released = label_preserving_loss(x, u, y, args["lp_temperature"], compat=True, instances=args["instances"])
    assert_allclose(released.item(), g[f"out_{layout}_lp_loss"], atol=1e-5)
    released.backward()
    assert relative(x.grad.numpy(), g[f"out_{layout}_lp_grad"]) < 1e-4


@pytest.mark.parametrize("kind, rule", [("hard", "hard"), ("all", "mean")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_golden_total_and_memory(g, args, layout, kind, rule):
    x, y, u, _ = batch(g, args, layout)
    memory = ClusterMemory(g["in_memory"], args[kind]["momentum"], args["temperature"], rule)
    both, labels = torch.cat([x, u]), np.tile(y, 2)
    loss = memory(both, labels)
    assert_allclose(loss.item(), g[f"out_{layout}_memory_loss"], atol=1e-5)
    total = loss + args[kind]["weight"] * label_preserving_loss(x, u, y, compat=True)
    assert_allclose(total.item(), g[f"out_{layout}_{kind}_total"], atol=1e-5)
    total.backward()
    assert relative(x.grad.numpy(), g[f"out_{layout}_{kind}_grad"]) < 1e-4
    memory.update(both, labels)
    assert_allclose(memory.prototypes, g[f"out_{layout}_{kind}_memory"], atol=2e-6)


# -- against loops --------------------------------------------------------------------------------------------------------------
def by_loop(x, u, y, temperature):
    e = np.exp(x.astype(np.float64) @ u.T.astype(np.float64) / temperature)
    terms = []
    for i, own in enumerate(y):
        p = min(e[i, j] for j in range(len(y)) if y[j] == own)
        q = sum(max(e[i, j] for j in range(len(y)) if y[j] == k) for k in set(y.tolist()) - {own})
        terms.append(-math.log(p / (p + q)))
    return np.mean(terms)


@pytest.mark.parametrize("seed", range(6))
def test_label_preserving_loss_against_a_loop(seed):
    rng = np.random.default_rng(seed)
    x, u = F.normalize(torch.tensor(rng.normal(size=(2, 20, 5))), dim=2).numpy()
    y = rng.integers(0, 1 + seed, 20)  # of seed 0 all are of one cluster
    got = label_preserving_loss(x, u, y, .3)
    assert_allclose(got, by_loop(x, u, y, .3), atol=1e-9)
    order = rng.permutation(20)
    assert_allclose(label_preserving_loss(x[order], u[order], y[order] * 7 + 2, .3), got)


def test_gradient_is_that_of_the_loss():
    rng = np.random.default_rng(0)
    x, u = (F.normalize(torch.tensor(rng.normal(size=(9, 4))), dim=1).requires_grad_() for _ in range(2))
    y = torch.tensor([0, 0, 1, 1, 2, 2, 2, 5, 0])
    assert torch.autograd.gradcheck(lambda a, b: label_preserving_loss(a, b, y), (x, u))
    prototypes = F.normalize(torch.tensor(rng.normal(size=(6, 4))), dim=1)
    assert torch.autograd.gradcheck(lambda a: support_samples(a, y, prototypes, .5)[0], (x,))


@pytest.mark.parametrize("seed", range(3))
def test_supports_against_a_loop(seed):
    rng = np.random.default_rng(seed)
    x, m = (F.normalize(torch.tensor(rng.normal(size=(n, 4))), dim=1).numpy() for n in (10, 5))
    y = rng.integers(0, 5, 10)
    u, nearest = support_samples(x, y, m, .4)
    for i in range(10):
        n = max((c for c in range(5) if c != y[i]), key=lambda c: x[i] @ m[c])
        v = x[i] + .2 * (m[n] - m[y[i]])
        assert nearest[i] == n
        assert_allclose(u[i], v / np.linalg.norm(v), atol=1e-6)


# -- corners --------------------------------------------------------------------------------------------------------------------
def test_one_cluster_has_no_supports(capsys):
    x = F.normalize(torch.ones(3, 4), dim=1)
    u, nearest = support_samples(x, [0, 0, 0], np.ones((1, 4), np.float32) / 2, .5)
    assert torch.equal(u, x) and nearest.tolist() == [0, 0, 0] and "no supports" in capsys.readouterr().out
    assert label_preserving_loss(x, u, [0, 0, 0]) == 0 and abs(label_preserving_loss(x, u, [0, 0, 0], compat=True)) < 1e-4


def test_no_push_gives_the_features_and_nothing_is_changed_in_place():
    x, m = F.normalize(torch.randn(5, 4), dim=1), F.normalize(torch.randn(3, 4), dim=1)
    before = x.clone(), m.clone()
    assert_allclose(support_samples(x, [0, 1, 2, 0, 1], m, strength(0, 10))[0], x, atol=1e-6)
    support_samples(x, [0, 1, 2, 0, 1], m, .5)
    assert torch.equal(x, before[0]) and torch.equal(m, before[1])


def test_refused():
    x, m = np.eye(3, 4), np.eye(3, 4)
    for step, total in ((-1, 10), (11, 10), (1, 0), (.5, 10)):
        with pytest.raises(ValueError, match="step"): strength(step, total)
    with pytest.raises(ValueError, match="targets: found 3, expected 0 to 2"): support_samples(x, [0, 1, 3], m, .1)
    with pytest.raises(ValueError, match="strength"): support_samples(x, [0, 1, 2], m, 2)
    with pytest.raises(ValueError, match="same width"): support_samples(x, [0, 1, 2], np.eye(3), .1)
    with pytest.raises(ValueError, match="one support per image"): label_preserving_loss(x, x[:, :2], [0, 1, 2])
    with pytest.raises(ValueError, match="temperature"): label_preserving_loss(x, x, [0, 1, 2], 0)
    with pytest.raises(ValueError, match="instances"): label_preserving_loss(x, x, [0, 1, 2], compat=True, instances=0)


# -- runs -----------------------------------------------------------------------------------------------------------------------
def run(tiny, out=None, stop=None, method=ISE, **given):
    settings = training.resolve(method, tiny.name, **dict(epochs=3, iterations=3, batch_size=16, eval_every=9) | given)
    t = training.start(tiny, method, settings, seed=1, out=out)
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
    assert records(again) == records(whole) and (again.method.steps, again.method.total) == (9, 9)


def test_a_longer_run_keeps_the_strength_it_began_with(tiny, tmp_path):
    run(tiny, tmp_path, stop=1, epochs=2)
    again = run(tiny, tmp_path, epochs=3)
    assert again.method.total == 6 and again.method.steps == 9 and len(again.history) == 3


def test_supports_go_farther_as_the_run_goes_on(whole):
    steps = [r["step"] for r in whole.history]
    assert 0 < steps[0] < steps[1] < steps[2] < .5 and all(0 <= r["images_away"] <= r["supports_away"] <= 1 for r in whole.history)


def test_settings_reach_the_loss(tiny, whole):
    for name, value in dict(supports=False, lp_weight=0.0, lp_temperature=.1, compat=True, update="hard", momentum=.9).items():
        assert records(run(tiny, **{name: value})) != records(whole), name


def test_without_both_it_is_the_baseline(tiny):
    bare, plain = (run(tiny, epochs=1, method=m, **given).history[0]["loss"] for m, given in ((ISE, dict(supports=False, lp_weight=0.0)), (Baseline, {})))
    assert_allclose(bare, plain, atol=1e-5)


def test_command_line(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("REIDBOOK_RUNS", str(tmp_path))
    main(f"run --dataset synthetic-tiny --method ise --root {root} -p epochs=1 -p iterations=2 -p batch_size=16".split())
    assert "mAP" in capsys.readouterr().out and list(tmp_path.glob("synthetic-tiny-ise-s1-*"))
