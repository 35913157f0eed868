"Damage: each kind changes the share that was asked for, in the way that its name says."
import numpy as np
import pytest
from reidbook.damage import DAMAGES, alone, changed_pairs, damage, merge_alike, repair_effect

RNG = np.random.default_rng
N_PEOPLE = 40
PIDS = np.repeat(np.arange(N_PEOPLE), 6)
CAMS = np.tile([0, 0, 1, 1, 2, 2], N_PEOPLE)
FEATS = RNG(0).normal(size=(N_PEOPLE, 8))[PIDS] + 0.1 * RNG(1).normal(size=(len(PIDS), 8))
FEATS /= np.linalg.norm(FEATS, axis=1, keepdims=True)


def damaged(labels, new):
    "Images whose group of images is another one than before."
    group = lambda x, i: frozenset(np.flatnonzero(x == x[i])) if x[i] >= 0 else frozenset([i])
    return np.array([group(labels, i) != group(new, i) for i in range(len(labels))])


@pytest.mark.parametrize("kind", [k for k in DAMAGES if k not in ("lost members", "flips")])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.4, 1.0])
def test_whole_clusters_hold_the_share(kind, share):
    new = damage(PIDS, kind, share, RNG(3), FEATS, CAMS)
    found = damaged(PIDS, new).mean()
    a_pair = 12 / len(PIDS)  # what the last merge may add
    assert share - 1e-9 <= found <= min(1, share + a_pair)


@pytest.mark.parametrize("kind", ["lost members", "flips"])
def test_single_images_hold_the_share(kind):
    new = damage(PIDS, kind, 0.2, RNG(3), FEATS, CAMS)
    assert abs((new < 0).mean() - 0.2) < 0.02 if kind == "lost members" else (new >= 0).all()
    if kind == "flips":
        home = np.array([np.bincount(new[PIDS == p]).argmax() for p in range(N_PEOPLE)])
        assert abs((new != home[PIDS]).mean() - 0.2) < 0.02


@pytest.mark.parametrize("kind", ["merge of look-alikes", "merge at random"])
def test_nobody_merges_twice(kind):
    new = damage(PIDS, kind, 1, RNG(0), FEATS, CAMS)
    people = [len(np.unique(PIDS[new == c])) for c in np.unique(new)]
    assert people == [2] * (N_PEOPLE // 2)


def test_look_alikes_are_the_nearest_that_are_free():
    feats = np.array([[1, 0], [0.99, 0.1], [0, 1], [0.1, 0.99]]) / np.linalg.norm([0.99, 0.1])
    for seed in range(5):
        new = merge_alike(np.arange(4), 1, RNG(seed), feats)
        assert new[0] == new[1] and new[2] == new[3] and new[0] != new[2]


def test_pairs_are_those_that_one_would_count():
    rng = RNG(5)
    before, after, pids = (rng.integers(-1, 4, 30) for _ in range(3))
    pids = pids + 1
    before, after = alone(before), alone(after)
    i, j = np.triu_indices(30, 1)
    right = lambda x: (x[i] == x[j]) == (pids[i] == pids[j])
    assert changed_pairs(before, after, pids) == (~right(before) & right(after)).sum()
    effect = repair_effect(before, after, pids)
    assert effect["broken"] == (right(before) & ~right(after)).sum()
    assert effect["wrong"] == (~right(before)).sum()
