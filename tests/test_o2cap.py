"O2CAP: the reference implementation's numbers, loops as an oracle, corner cases, and runs."
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose, assert_array_equal

from reidbook import training
from reidbook.data import open_dataset
from reidbook.memory import camera_proxies, ClusterMemory
from reidbook.methods.o2cap import O2CAP, offline_loss, online_loss, online_positives


@pytest.fixture(scope="module")
def g(golden): return golden("next_o2cap")


def relative(got, want): return np.abs(got - want).max() / np.abs(want).max()


def both(g, x):
    return {"offline": offline_loss(x, g["in_targets"], g["in_batch_cams"], g["in_proxies"], g["in_proxy_pids"]),
            "online": online_loss(x, g["in_batch_proxies"], g["in_batch_cams"], g["in_proxies"], g["in_proxy_cams"])}


# -- golden ---------------------------------------------------------------------------------------------------------------------
def test_golden_proxies(g):
    rows, pids, cams = camera_proxies(g["in_features_all"], g["in_labels"], g["in_cams"])
    assert_allclose(rows, g["in_proxies"], atol=2e-6)
    assert_array_equal(pids, g["in_proxy_pids"])
    assert_array_equal(cams, g["in_proxy_cams"])


@pytest.mark.parametrize("name", ["offline", "online", "total"])
def test_golden_losses_and_gradients(g, name):
    x = torch.tensor(g["in_features"], requires_grad=True)
    losses = both(g, x)
    loss = sum(losses.values()) if name == "total" else losses[name]
    assert_allclose(loss.item(), g[f"out_{name}_loss"], atol=5e-5 if name == "total" else 3e-5)
    loss.backward()
    assert relative(x.grad.numpy(), g[f"out_{name}_grad"]) < 1e-4


def test_golden_every_camera_alone(g):
    for cam, offline, online in zip(g["out_cam_ids"], g["out_cam_offline"], g["out_cam_online"]):
        rows = g["in_batch_cams"] == cam
        part = {k: v[rows] if k in ("in_features", "in_targets", "in_batch_cams", "in_batch_proxies") else v for k, v in g.items() if k.startswith("in_")}
        assert_allclose([v.item() for v in both(part, torch.tensor(part["in_features"])).values()], [offline, online], atol=1e-5)


def test_golden_memory(g):
    memory = ClusterMemory(g["in_proxies"], json.loads(str(g["args"]))["momentum"])
    memory.update(torch.tensor(g["in_features"]), g["in_batch_proxies"])
    assert_allclose(memory.prototypes, g["out_proxies"], atol=2e-6)


def test_golden_few_proxies_in_two_cameras(g):
    x, own, m = g["in_few_features"], g["in_few_own"], g["in_few_proxies"]
    pids, cams = g["in_few_proxy_pids"], g["in_few_proxy_cams"]
    assert_allclose(offline_loss(x, pids[own], cams[own], m, pids).item(), g["out_few_offline"], atol=1e-5)
    assert_allclose(online_loss(x, own, cams[own], m, cams).item(), g["out_few_online_meant"], atol=1e-5)


# -- against loops --------------------------------------------------------------------------------------------------------------
def scene(seed, n=12, m=20, cameras=4):
    rng = np.random.default_rng(seed)
    x, proxies = (F.normalize(torch.tensor(rng.normal(size=(k, 6))), dim=1).numpy() for k in (n, m))
    pids, cams = np.arange(m) // 3, 10 * rng.integers(0, cameras, m) - 7
    return x, proxies, pids, cams, rng.integers(0, m, n)


def by_loop(x, proxies, pids, cams, own, k=5, tau=.07, p=3, balance=.15):
    offline, online = {}, {}
    for i, o in enumerate(own):
        s = proxies @ x[i]
        mine = np.flatnonzero(pids == pids[o])
        others = sorted(np.flatnonzero(pids != pids[o]), key=lambda j: -s[j])[:k]
        e = np.exp(s / tau)
        offline.setdefault(cams[o], []).append(np.mean([-np.log(e[j] / e[[*mine, *others]].sum()) for j in mine]))
        a = balance * s + (1 - balance) * proxies @ proxies[o]
        best = [max(np.flatnonzero(cams == c), key=lambda j: a[j]) for c in np.unique(cams)]
        best = sorted(best, key=lambda j: -a[j])[:p]
        rest = sorted(set(range(len(a))) - set(best), key=lambda j: -a[j])[:k]
        online.setdefault(cams[o], []).append(np.mean([-np.log(e[j] / e[[*best, *rest]].sum()) for j in best]))
    return [sum(np.mean(v) for v in d.values()) for d in (offline, online)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("cameras", [1, 2, 4])
def test_losses_against_a_loop(seed, cameras):
    x, m, pids, cams, own = scene(seed, cameras=cameras)
    order = np.random.default_rng(seed).permutation(len(x))
    for rows in slice(None), order:
        got = (offline_loss(x[rows], pids[own][rows], cams[own][rows], m, pids, hard_negatives=5),
               online_loss(x[rows], own[rows], cams[own][rows], m, cams, hard_negatives=5))
        assert_allclose(got, by_loop(x, m, pids, cams, own), rtol=1e-6)


def test_gradient_is_that_of_the_loss():
    x, m, pids, cams, own = scene(0)
    x = torch.tensor(x, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: offline_loss(a, pids[own], cams[own], m, pids, .5), (x,))
    assert torch.autograd.gradcheck(lambda a: online_loss(a, own, cams[own], m, cams, .5, balance=0.), (x,))


# -- corners --------------------------------------------------------------------------------------------------------------------
def test_a_single_proxy_costs_nothing():
    x, m = np.array([[.6, .8]]), np.array([[1., 0.]])
    assert offline_loss(x, [3], [0], m, [3]) == 0 and online_loss(x, [0], [0], m, [0]) == 0


def test_positives_are_of_different_cameras():
    x, m, pids, cams, own = scene(3)
    chosen, _ = online_positives(x, own, m, cams)
    assert all(len(set(cams[row])) == 3 for row in chosen.numpy()) and (chosen.numpy() == own[:, None]).any(1).all()


def test_nothing_is_changed_in_place():
    x, m, pids, cams, own = scene(1)
    before = x.copy(), m.copy()
    offline_loss(x, pids[own], cams[own], m, pids), online_loss(x, own, cams[own], m, cams)
    assert (x == before[0]).all() and (m == before[1]).all()


def test_refused():
    x, m, pids, cams, own = scene(1)
    with pytest.raises(ValueError, match="same width"): offline_loss(x[:, :3], pids[own], cams[own], m, pids)
    with pytest.raises(ValueError, match="proxy_pids"): offline_loss(x, pids[own], cams[own], m, pids[:4])
    with pytest.raises(ValueError, match="own"): online_loss(x, own + len(m), cams[own], m, cams)
    with pytest.raises(ValueError, match="proxy_cams"): online_loss(x, own, cams[own], m, cams[:4])
    with pytest.raises(ValueError, match="balance"): online_loss(x, own, cams[own], m, cams, balance=2)


# -- runs -----------------------------------------------------------------------------------------------------------------------
def test_one_loss_alone_and_a_rising_rate(root):
    data = open_dataset("synthetic-tiny", root)
    for given, names in (({"online_weight": 0.0}, {"offline"}), ({"offline_weight": 0.0, "warmup": 2}, {"online"})):
        t = training.start(data, O2CAP, training.resolve(O2CAP, data.name, epochs=3, iterations=2, eval_every=3, **given), seed=1)
        records = list(training.epochs(t))
        assert {"offline", "online"} & set(records[0]) == names
    lr = t.settings.lr
    assert_allclose([r["lr"] for r in records], [.01 * lr, .505 * lr, lr])


def test_no_cameras_no_method(root):
    data = open_dataset("synthetic-tiny", root)
    data.train = data.train.drop(columns="cam")
    with pytest.raises(ValueError, match="O2CAP needs to know which camera"): training.start(data, O2CAP, training.resolve(O2CAP, data.name), seed=1)
