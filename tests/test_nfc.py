"Neighbour feature centralisation: vectors of the released code, and a dense oracle."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reidbook.evaluation import identity_density, mutual_neighbors, neighbor_feature_centralization, unit_rows


@pytest.mark.parametrize("key, k, k_back", [("out_k2", 2, None), ("out_k4", 4, None), ("out_k4_2", 4, 2)])
def test_golden(golden, key, k, k_back):
    g = golden("next_nfc")
    np.testing.assert_allclose(neighbor_feature_centralization(g["in_features"], k, k_back), g[key], atol=2e-6)
    np.testing.assert_allclose(neighbor_feature_centralization(torch.from_numpy(g["in_features"]), k, k_back), g[key], atol=2e-6)


def test_golden_rows_are_normalised_first(golden):
    g = golden("next_nfc")
    np.testing.assert_allclose(neighbor_feature_centralization(g["in_raw"]), g["out_raw_demo_k2"], atol=2e-6)
    assert np.abs(unit_rows(g["out_raw_root_k2"]) - g["out_raw_demo_k2"]).max() > 0.1  # the other released file


def test_golden_density(golden):
    g = golden("next_nfc")
    np.testing.assert_allclose(identity_density(g["in_features"], g["in_pids"]), g["out_density_before"], atol=2e-6)
    np.testing.assert_allclose(identity_density(g["out_k2"], g["in_pids"]), g["out_density_after"], atol=2e-6)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 6), st.integers(0, 10))
def test_dense_oracle(n, k, k_back, seed):
    x = unit_rows(np.random.default_rng(seed).normal(size=(n, 5)))
    near = np.argsort(np.where(np.eye(n, dtype=bool), np.inf, -(x @ x.T)), 1, kind="stable")[:, :n - 1]
    named = lambda k: np.array([np.isin(np.arange(n), near[i, :k]) for i in range(n)])
    mutual = named(k) & named(k_back).T
    np.testing.assert_allclose(neighbor_feature_centralization(x, k, k_back), unit_rows(x + mutual @ x), atol=1e-5)
    i, j = mutual_neighbors(x, k, k_back)
    assert sorted(zip(i.tolist(), j.tolist())) == [tuple(p) for p in np.argwhere(mutual).tolist()]


def test_lonely_equal_and_wrong_rows():
    assert neighbor_feature_centralization([[3.0, 4.0]]).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]]
    same = np.ones((5, 3))
    np.testing.assert_allclose(neighbor_feature_centralization(same), unit_rows(same), rtol=1e-6)
    assert (neighbor_feature_centralization(np.zeros((3, 2))) == 0).all()
    before = np.eye(3)
    neighbor_feature_centralization(before)
    assert (before == np.eye(3)).all()
    with pytest.raises(ValueError, match="NaN"): neighbor_feature_centralization([[np.nan, 1.0]])
    with pytest.raises(ValueError, match="at least 1"): neighbor_feature_centralization(same, 0)
    with pytest.raises(ValueError, match="k_back"): neighbor_feature_centralization(same, 2, 0)
    with pytest.raises(ValueError, match="pids"): identity_density(same, [1, 2])
