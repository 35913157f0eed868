"DCMIP: the reference implementation's numbers, loops as an oracle, corner cases, and runs."

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose

from reidbook import training
from reidbook.data import open_dataset
from reidbook.methods.dcmip import DCMIP, instance_loss, prototype_loss, refresh_instances, two_losses, update_prototypes
from reidbook.training import teacher_step

SHORT = dict(epochs=2, iterations=2, eval_every=2, first_epochs=1)


@pytest.fixture(scope="module")
def g(golden): return golden("next_dcmip")


def relative(got, want): return np.abs(got - want).max() / np.abs(want).max()


# -- golden ---------------------------------------------------------------------------------------------------------------------
def test_golden_cross_entropies(g):
    assert_allclose([x.item() for x in two_losses(g["in_features"], g["in_labels"], g["in_a"], g["in_b"])], [g["out_ce_a"], g["out_ce_b"]], atol=1e-5)


@pytest.mark.parametrize("features, name", [("in_features", "prototype"), ("in_easy_features", "easy"), ("in_features", "instance")])
def test_golden_losses_and_gradients(g, features, name):
    x = torch.tensor(g[features], requires_grad=True)
    rows = (g["in_instances"],) if name == "instance" else (g["in_a"], g["in_b"])
    loss = (instance_loss if name == "instance" else prototype_loss)(x, g["in_labels"], *rows)
    assert_allclose(loss.item(), g[f"out_{name}_loss"], atol=1e-5)
    loss.backward()
    assert relative(x.grad.numpy(), g[f"out_{name}_grad"]) < 1e-4


@pytest.mark.parametrize("name, rule", [("market", "hard"), ("msmt17", "mean")])
def test_golden_prototypes(g, name, rule):
    a, b = update_prototypes(g["in_a"], g["in_b"], g["in_features"], g["in_labels"], rule=rule)
    assert_allclose(a, g[f"out_{name}_a"], atol=2e-6)
    assert_allclose(b, g[f"out_{name}_b"], atol=2e-6)


def test_golden_instances(g):
    new = refresh_instances(g["in_instances"], g["in_features"], g["in_labels"], torch.Generator().manual_seed(0)).numpy()
    as_set = lambda rows: {tuple(r) for r in np.round(rows, 4).tolist()}
    for c in range(10):
        drawn = g["in_labels"] == c
        if not drawn.any(): assert (new[c] == g["in_instances"][c]).all()
        elif drawn.sum() >= 16: assert as_set(new[c]) == as_set(g["out_instances"][c])
        else: assert as_set(new[c]) <= as_set(F.normalize(torch.tensor(g["in_features"][drawn]), dim=1).numpy())


def test_golden_teacher(g):
    teacher, student = (torch.nn.Linear(40, 1, bias=False) for _ in range(2))
    with torch.no_grad():
        teacher.weight.copy_(torch.tensor(g["in_teacher"])[None])
        student.weight.copy_(torch.tensor(g["in_student"])[None])
    teacher_step(teacher, student)
    assert_allclose(teacher.weight.detach()[0], g["out_teacher"], atol=1e-6)


# -- against loops --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(4))
def test_instance_loss_against_a_loop(seed):
    rng = np.random.default_rng(seed)
    x, m, y = rng.normal(size=(9, 5)), rng.normal(size=(4, 3, 5)), rng.integers(0, 4, 9)
    unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)
    x, m = unit(x), unit(m)
    terms = []
    for f, c in zip(x, y):
        z = np.array([(m[k] @ f).min() if k == c else (m[k] @ f).max() for k in range(4)]) / .3
        terms.append(np.log(np.exp(z).sum()) - z[c])
    order = rng.permutation(9)
    assert_allclose([instance_loss(x, y, m, .3), instance_loss(3 * x[order], y[order], m, .3)], np.mean(terms), rtol=1e-9)


def test_gradient_is_that_of_the_loss():
    rng = np.random.default_rng(1)
    x, a, b = (torch.tensor(rng.normal(size=(n, 4))) for n in (6, 3, 3))
    y, x = torch.tensor([0, 1, 2, 0, 1, 2]), x.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: prototype_loss(f, y, F.normalize(a), F.normalize(b), temperature=.5), (x,))
    assert torch.autograd.gradcheck(lambda f: instance_loss(f, y, F.normalize(torch.stack([a, b], 1), dim=2), .5), (x,))


# -- corners --------------------------------------------------------------------------------------------------------------------
def test_below_the_margin_only_the_second_counts():
    x, rows = np.eye(3), np.eye(3)
    assert prototype_loss(x, [0, 1, 2], rows, rows, margin=5.).item() == pytest.approx(two_losses(x, [0, 1, 2], rows, rows)[1].item() / 2)


def test_nothing_is_changed_in_place():
    x, a, m = (F.normalize(torch.randn(*shape), dim=-1) for shape in ((4, 3), (2, 3), (2, 5, 3)))
    before = x.clone(), a.clone(), m.clone()
    update_prototypes(a, a, x, [0, 0, 1, 1])
    refresh_instances(m, x, [0, 0, 1, 1])
    assert all(torch.equal(p, q) for p, q in zip(before, (x, a, m)))


def test_refused():
    x, a = np.eye(3, 4), np.eye(3, 4)
    with pytest.raises(ValueError, match="second"): prototype_loss(x, [0, 1, 2], a, a[:, :3])
    with pytest.raises(ValueError, match="targets"): prototype_loss(x, [0, 1, 3], a, a)
    with pytest.raises(ValueError, match="instances"): instance_loss(x, [0, 1, 2], a)
    with pytest.raises(ValueError, match="rule 'all'"): update_prototypes(a, a, x, [0, 1, 2], rule="all")


# -- runs -----------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny(root): return open_dataset("synthetic-tiny", root)


def begin(tiny, store=None, out=None, **given): return training.start(tiny, DCMIP, training.resolve(DCMIP, tiny.name, **SHORT | given), seed=1, store=store, out=out)


def without_times(records): return [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in records]


def test_the_second_stage_begins_where_the_first_ended(tiny, tmp_path):
    t = begin(tiny, tmp_path)
    assert all(torch.equal(t.method.first[k], v) for k, v in t.model.state_dict().items())
    assert all(torch.equal(v, w) for v, w in zip(t.model.state_dict().values(), t.method.teacher.model.state_dict().values()))
    first = without_times(training.epochs(t))
    assert "instances" in first[0] and 0 <= first[0]["hinge_off"] <= 1
    again = begin(tiny, tmp_path)
    assert [s["made"] for s in again.stages] == [False] and without_times(training.epochs(again)) == first


def test_teacher_is_tested_and_follows(tiny, tmp_path):
    t = begin(tiny, tmp_path)
    list(training.epochs(t))
    assert t.method.network(t) is t.method.teacher.model is not t.model
    far = lambda net: sum((p - t.method.first[n]).square().sum().item() for n, p in net.named_parameters())
    assert 0 < far(t.method.teacher.model) < far(t.model)


def test_a_resumed_run_is_the_undisturbed_one(tiny, tmp_path):
    whole = without_times(training.epochs(begin(tiny, tmp_path / "store")))
    next(training.epochs(begin(tiny, tmp_path / "store", tmp_path / "run")))
    again = begin(tiny, tmp_path / "store", tmp_path / "run")
    assert again.epoch == 1
    list(training.epochs(again))
    assert without_times(again.history) == whole


def test_pieces_off(tiny, tmp_path):
    t = begin(tiny, tmp_path, instance_weight=0.0, first_epochs=0, result="student")
    records = list(training.epochs(t))
    assert "instances" not in records[0] and not t.stages and t.method.network(t) is t.model
