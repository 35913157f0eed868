"Memories and batch losses against the reference implementations, and where they could go wrong."
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from reidbook.memory import ClusterMemory, HybridMemory, info_nce, mean_update, prototypes, soft_triplet_loss


def relative(got, want): return np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.parametrize("rule, key", [("mean", "cm"), ("hard", "hard")])
def test_cluster_memory_is_the_reference(golden, rule, key):
    g = golden("pplr_memory")
    x = torch.tensor(g["in_x"], requires_grad=True)
    y = torch.tensor(g["in_targets"])
    memory = ClusterMemory(g["in_features0"], momentum=0.1, temperature=0.05, update=rule)
    loss = memory(x, y)
    memory.update(x, y)
    loss.backward()
    assert_allclose(loss.item(), g[f"out_{key}_loss"], atol=1e-6)
    assert relative(x.grad.numpy(), g[f"out_{key}_grad"]) < 1e-5
    assert_allclose(memory.prototypes.numpy(), g[f"out_{key}_features"], atol=1e-6)


def test_hybrid_memory_is_the_reference(golden):
    g = golden("pplr_memory")
    x = torch.nn.functional.normalize(torch.tensor(g["in_x"])).requires_grad_()
    index = torch.tensor(g["in_hm_indexes"])
    memory = HybridMemory(g["in_hm_features0"], g["in_hm_labels"], momentum=0.2)
    loss = memory(x, index)
    memory.update(x, index)
    loss.backward()
    assert_allclose(loss.item(), g["out_hm_loss"], atol=1e-6)
    assert relative(x.grad.numpy(), g["out_hm_grad"]) < 1e-5
    assert_allclose(memory.features.numpy(), g["out_hm_features"], atol=1e-6)


@pytest.mark.parametrize("epoch", [0, 1])
def test_hybrid_memory_leaves_out_classes_without_images(golden, epoch):
    g = golden("next_spcl")
    rows = g["in_features"] if epoch == 0 else g["in_features_e1"]
    x, index, labels = torch.tensor(g[f"in_e{epoch}_batch"], requires_grad=True), g[f"in_e{epoch}_index"], g[f"out_e{epoch}_labels"]
    assert len(set(labels)) <= labels.max()  # numbers with gaps
    memory = HybridMemory(rows, labels, momentum=0.2)
    loss = memory(x, torch.tensor(index))
    memory.update(x, index)
    loss.backward()
    assert_allclose(loss.item(), g[f"out_e{epoch}_loss"], atol=2e-6)
    assert relative(x.grad.numpy(), g[f"out_e{epoch}_grad"]) < 1e-5
    assert_allclose(memory.features.numpy(), g[f"out_e{epoch}_memory"], atol=2e-6)


def test_soft_triplet_is_the_reference(golden):
    g = golden("pplr_losses")
    x = torch.tensor(g["in_emb"], requires_grad=True)
    loss = soft_triplet_loss(x, g["in_targets"])
    loss.backward()
    assert_allclose(loss.item(), g["out_softtriplet"], atol=1e-6)
    assert relative(x.grad.numpy(), g["out_softtriplet_grad"]) < 1e-5


@pytest.mark.parametrize("seed", range(5))
def test_rounds_equal_one_item_at_a_time(seed):
    rng = np.random.default_rng(seed)
    memory = torch.nn.functional.normalize(torch.tensor(rng.normal(size=(7, 5))), dim=1)
    x = torch.nn.functional.normalize(torch.tensor(rng.normal(size=(40, 5))), dim=1)
    y = rng.integers(0, 7, 40)
    slow = memory.clone()
    for xi, yi in zip(x, y): slow[yi] = torch.nn.functional.normalize(0.3 * slow[yi] + 0.7 * xi, dim=0)
    assert_allclose(mean_update(memory, x, y, 0.3), slow, rtol=1e-12)


def test_prototypes_skip_outliers_and_refuse_gaps():
    feats = np.eye(4, dtype=np.float32)
    assert_allclose(prototypes(feats, [1, 0, -1, 0])[0], np.array([0, 1, 0, 1]) / np.sqrt(2), rtol=1e-6)
    with pytest.raises(ValueError, match="clusters \\[1\\] have no member"): prototypes(feats, [0, 2, 2, 0])
    with pytest.raises(ValueError, match="4 features but 3 labels"): prototypes(feats, [0, 0, 0])


def test_momentum_one_keeps_the_memory():
    memory = ClusterMemory(np.eye(3), momentum=1.0)
    memory.update(torch.randn(6, 3), [0, 1, 2, 0, 1, 2])
    assert_allclose(memory.prototypes, np.eye(3))


def test_info_nce_sees_the_nearest_prototype():
    assert info_nce(torch.eye(3), torch.eye(3), torch.arange(3), 1.0) < np.log(3)
