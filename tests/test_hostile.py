"""Every public call of the numeric chapters with one argument spoilt: the right answer, or a ValueError of ours that says what was found.

Never an IndexError, ZeroDivisionError, KeyError or RuntimeError from below, nor a bare assertion of numba or faiss."""
import contextlib
import importlib.util
import inspect
import io
import traceback
import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import nn

from reidbook import clustering, evaluation, memory, models, neighbors, noise, open_set
from reidbook.methods import glc, icsr, ise, mprd, pplr, purification, spcl

N, D, C = 24, 6, 4
rng = np.random.default_rng(0)


def unit(x): return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


x = unit(np.eye(D)[np.arange(N) % C] + .2 * rng.normal(size=(N, D)))
labels, cams = np.arange(N) % C, np.arange(N) // C % 3
sims, idx = neighbors.knn(x, 6)
jaccard = neighbors.jaccard_similarity(x, 6, 2)
protos = memory.prototypes(x, labels)
parts = unit(rng.normal(size=(N, 2, D)))
logits, part_logits, scores = rng.normal(size=(N, C)), rng.normal(size=(N, 2, C)), rng.random((N, 2))


class Tiny(nn.Module):
    def forward(self, images): return images.mean((2, 3)), None


def cluster_memory(prototypes, momentum, temperature, update, features, targets):
    m = memory.ClusterMemory(prototypes, momentum, temperature, update)
    loss = m(features, targets)
    m.update(features, targets)
    return loss, m.prototypes


def hybrid_memory(features, labels, momentum, temperature, batch, index):
    m = memory.HybridMemory(features, labels, momentum, temperature)
    loss = m(batch, index)
    m.update(batch, index)
    return loss, m.features


# name -> (call, arguments and what each is)
CALLS = {
    "as_matrix": (neighbors.as_matrix, dict(features=("matrix", x))),
    "as_ids": (neighbors.as_ids, dict(values=("ids", labels))),
    "knn": (neighbors.knn, dict(features=("matrix", x), k=("count", 3))),
    "neighbor_lists": (neighbors.neighbor_lists, dict(features=("matrix", x), k=("count", 3))),
    "list_agreement": (neighbors.list_agreement, dict(lists_a=("lists", idx), lists_b=("lists", idx[:, :3]))),
    "jaccard_similarity": (neighbors.jaccard_similarity, dict(features=("matrix", x), k1=("count", 6), k2=("count", 2), min_similarity=("number", 0.1))),
    "jaccard_of_lists": (lambda similarities, indices: neighbors.jaccard_similarity(x, 6, 2, neighbors=(similarities, indices)), dict(similarities=("matrix", sims), indices=("lists", idx))),
    "re_rank": (neighbors.re_rank, dict(query=("matrix", x[:8]), gallery=("matrix", x[8:]), k1=("count", 6), k2=("count", 2), lambda_value=("number", 0.3))),
    "camera_jaccard": (neighbors.camera_jaccard, dict(features=("matrix", x), cams=("ids", cams), min_similarity=("number", 0.1))),
    "camera_re_rank": (neighbors.camera_re_rank, dict(query=("matrix", x[:8]), gallery=("matrix", x[8:]), q_cams=("ids", cams[:8]), g_cams=("ids", cams[8:]), lambda_value=("number", 0.3))),
    "fuse_similarities": (neighbors.fuse_similarities, dict(similarities=("given", [jaccard, jaccard]), weights=("vector", np.ones(2)))),
    "recall_on_sample": (neighbors.recall_on_sample, dict(features=("matrix", x), idx=("lists", idx), sample=("count", 10))),
    "min_similarity": (clustering.min_similarity, dict(eps=("number", 0.5))),
    "dbscan": (clustering.dbscan, dict(similarity=("square", jaccard), eps=("number", 0.5), min_samples=("count", 2))),
    "agglomerative": (clustering.agglomerative, dict(similarity=("square", jaccard), n_clusters=("count", 3))),
    "infomap_links": (clustering.infomap_links, dict(similarities=("matrix", sims), indices=("lists", idx), min_similarity=("number", 0.5))),
    "contingency": (noise.contingency, dict(labels=("ids", labels), pids=("ids", labels))),
    "label_quality": (noise.label_quality, dict(labels=("ids", labels), pids=("ids", labels))),
    "noise_kinds": (noise.noise_kinds, dict(labels=("ids", labels), pids=("ids", labels), cams=("ids or none", cams))),
    "noise_table": (noise.noise_table, dict(labels=("ids", labels), pids=("ids", labels), cams=("ids or none", cams))),
    "noise_record": (noise.noise_record, dict(labels=("ids", labels), pids=("ids", labels), cams=("ids or none", cams))),
    "prototypes": (memory.prototypes, dict(feats=("matrix", x), labels=("ids", labels))),
    "camera_proxies": (memory.camera_proxies, dict(features=("matrix", x), labels=("ids", labels), cams=("ids", cams))),
    "info_nce": (memory.info_nce, dict(feats=("batch", x), memory=("given", torch.tensor(protos)), targets=("ids", labels), temperature=("number", 0.1))),
    "mean_update": (memory.mean_update, dict(memory=("given", torch.tensor(protos)), feats=("given", torch.tensor(x)), targets=("ids", labels), momentum=("number", 0.1))),
    "hard_update": (memory.hard_update, dict(memory=("given", torch.tensor(protos)), feats=("given", torch.tensor(x)), targets=("ids", labels), momentum=("number", 0.1))),
    "ClusterMemory": (cluster_memory, dict(prototypes=("matrix", protos), momentum=("number", 0.1), temperature=("number", 0.1), update=("given", "mean"),
                                           features=("batch", x), targets=("ids", labels))),
    "HybridMemory": (hybrid_memory, dict(features=("matrix", x), labels=("ids", labels), momentum=("number", 0.1), temperature=("number", 0.1),
                                         batch=("batch", x[:4]), index=("ids", np.arange(4)))),
    "soft_triplet_loss": (memory.soft_triplet_loss, dict(features=("batch", x), targets=("ids", labels))),
    "evaluate": (evaluation.evaluate, dict(query=("matrix", x[:8]), gallery=("matrix", x[8:]), q_pids=("ids", labels[:8]), g_pids=("ids", labels[8:]),
                                           q_cams=("ids or none", cams[:8]), g_cams=("ids or none", cams[8:]), top=("count", 10))),
    "evaluate_distances": (evaluation.evaluate_distances, dict(distances=("table", 1 - x[:8] @ x[8:].T), q_pids=("ids", labels[:8]), g_pids=("ids", labels[8:]),
                                                               q_cams=("ids or none", cams[:8]), g_cams=("ids or none", cams[8:]), top=("count", 10))),
    "neighbor_feature_centralization": (evaluation.neighbor_feature_centralization, dict(features=("matrix", x), k=("count", 2), k_back=("count", 3))),
    "mutual_neighbors": (evaluation.mutual_neighbors, dict(features=("matrix", x), k=("count", 2), k_back=("count", 3))),
    "identity_density": (evaluation.identity_density, dict(features=("matrix", x), pids=("ids", labels))),
    "unit_rows": (evaluation.unit_rows, dict(features=("matrix", x))),
    "rank_lists": (evaluation.rank_lists, dict(query=("matrix", x[:8]), gallery=("matrix", x[8:]), k=("count", 5), q_pids=("ids", labels[:8]), g_pids=("ids", labels[8:]),
                                               q_cams=("ids or none", cams[:8]), g_cams=("ids or none", cams[8:]), rows=("ids or none", np.arange(3)))),
    "extract_features": (models.extract_features, dict(model=("given", Tiny()), images=("images", rng.integers(0, 255, (5, 3, 8, 4), np.uint8)), batch_size=("count", 2), device=("given", "cpu"))),
    "cross_agreement": (pplr.cross_agreement, dict(global_features=("matrix", x), part_features=("parts", parts), k=("count", 4))),
    "pglr_loss": (pplr.pglr_loss, dict(logits=("batch", logits), part_logits=("parts", part_logits), targets=("ids", labels), scores=("batch", scores), beta=("number", 0.5))),
    "aals_loss": (pplr.aals_loss, dict(part_logits=("parts", part_logits), targets=("ids", labels), scores=("batch", scores))),
    "inter_camera_loss": (pplr.inter_camera_loss, dict(features=("batch", x), targets=("ids", labels), cams=("ids", cams), proxies=("batch", x[:9]), proxy_pids=("ids", labels[:9]),
                                                       proxy_cams=("ids", cams[:9]), temperature=("number", 0.1), hard_negatives=("count", 3))),
    "cluster_weights": (icsr.cluster_weights, dict(labels=("ids", labels), cams=("ids", cams))),
    "weighted_loss": (icsr.weighted_loss, dict(features=("batch", x), targets=("ids", labels), prototypes=("matrix", protos), weights=("given", np.ones(len(protos), np.float32)), temperature=("number", 0.1))),
    "camera_loss": (icsr.camera_loss, dict(logits=("batch", logits), cams=("ids", labels))),
    "reverse_gradient": (icsr.reverse_gradient, dict(features=("given", torch.tensor(x)), factor=("number", 0.5))),
    "threshold_at": (open_set.threshold_at, dict(impostor=("vector", scores[:, 0]), rate=("number", 0.1))),
    "fnmr_at_fmr": (open_set.fnmr_at_fmr, dict(genuine=("vector", scores[:, 0]), impostor=("vector", scores[:, 1]), rate=("number", 0.1))),
    "equal_error": (open_set.equal_error, dict(genuine=("vector", scores[:, 0]), impostor=("vector", scores[:, 1]))),
    "pair_scores": (open_set.pair_scores, dict(query=("matrix", x[:8]), gallery=("matrix", x[8:]), q_pids=("ids", labels[:8]), g_pids=("ids", labels[8:]),
                                               q_cams=("ids or none", cams[:8]), g_cams=("ids or none", cams[8:]))),
    "open_set": (lambda **given: open_set.open_set(**given).dir_at_far(0.5), dict(query=("matrix", x[:8]), gallery=("matrix", x[8:]), q_pids=("ids", np.arange(8) % 6), g_pids=("ids", labels[8:]))),
    "threshold_from_clusters": (open_set.threshold_from_clusters, dict(features=("matrix", x), labels=("ids", labels), rate=("number", 0.1), cams=("ids or none", cams))),
    "node_scores": (icsr.node_scores, dict(similarities=("matrix", sims), indices=("lists", idx), min_similarity=("number", 0.5))),
    "information_nodes": (icsr.information_nodes, dict(scores=("vector", np.arange(N) / N), labels=("ids", labels), rule=("given", "max"))),
    "refine_labels": (icsr.refine_labels, dict(labels=("ids", labels), nodes=("nodes", {0: 0, 1: 5}), cams=("ids", cams), local_labels=("ids", labels), rate=("number", 0.5),
                                               draws=("vector or none", np.arange(N) / N))),
    "label_flips": (mprd.label_flips, dict(labels=("ids", labels), previous_labels=("ids or none", labels))),
    "affinity_graph": (glc.affinity_graph, dict(features=("matrix", x), k=("count", 5))),
    "decode": (glc.decode, dict(pairs=("pairs", np.stack([np.arange(N), np.roll(np.arange(N), 1)])), scores=("vector", np.full(N, .9)), n=("count", N), t1=("number", 0.6), t2=("number", 0.6), min_size=("count", 2))),
    "correct_labels": (lambda features, labels: glc.correct_labels(features, labels, k=5, subgraphs=(), width=4), dict(features=("matrix", x), labels=("ids", np.zeros(N, int)))),
    "reliable_labels": (spcl.reliable_labels, dict(similarity=("square", jaccard), eps=("number", 0.5), gap=("number", 0.1), min_samples=("count", 2), threshold=("number", 0.5), share=("number", 0.9))),
    "strength": (ise.strength, dict(step=("count", 3), total_steps=("count", 9))),
    "support_samples": (ise.support_samples, dict(features=("batch", x), targets=("ids", labels), prototypes=("batch", protos), strength=("number", 0.5))),
    "label_preserving_loss": (ise.label_preserving_loss, dict(features=("batch", x), supports=("batch", x), targets=("ids", labels), temperature=("number", 0.6))),
    "released_label_preserving_loss": (lambda features, supports, targets, instances: ise.label_preserving_loss(features, supports, targets, compat=True, instances=instances),
                                       dict(features=("batch", x), supports=("batch", x), targets=("ids", labels), instances=("count", 6))),
    "fuse": (purification.fuse, dict(global_=("square", jaccard), upper=("square", jaccard), lower=("square", jaccard), lambda1=("number", 0.15))),
}

# the latest systems; a reader may have deleted their notebooks
try: from reidbook.methods import dcmip
except ImportError: pass
else: CALLS |= {
    "prototype_loss": (dcmip.prototype_loss, dict(features=("batch", x), targets=("ids", labels), first=("batch", protos), second=("batch", protos), margin=("number", 0.2), temperature=("number", 0.1))),
    "update_prototypes": (dcmip.update_prototypes, dict(first=("batch", protos), second=("batch", protos), features=("batch", x), targets=("ids", labels), momentum=("number", 0.1), rule=("given", "hard"))),
    "instance_loss": (dcmip.instance_loss, dict(features=("batch", x), targets=("ids", labels), instances=("parts", np.stack([protos] * 3, 1)), temperature=("number", 0.1))),
    "refresh_instances": (dcmip.refresh_instances, dict(instances=("parts", np.stack([protos] * 3, 1)), features=("batch", x), targets=("ids", labels))),
}
try: from reidbook.methods import o2cap
except ImportError: pass
else: CALLS |= {
    "offline_loss": (o2cap.offline_loss, dict(features=("batch", x), targets=("ids", labels), cams=("ids", cams), proxies=("batch", x[:9]), proxy_pids=("ids", labels[:9]),
                                              temperature=("number", 0.1), hard_negatives=("count", 3))),
    "online_loss": (o2cap.online_loss, dict(features=("batch", x), own=("ids", np.arange(len(x)) % 9), cams=("ids", cams), proxies=("batch", x[:9]), proxy_cams=("ids", cams[:9]),
                                            temperature=("number", 0.1), hard_negatives=("count", 3), positives=("count", 2), balance=("number", 0.2))),
    "online_positives": (o2cap.online_positives, dict(features=("batch", x), own=("ids", np.arange(len(x)) % 9), proxies=("batch", x[:9]), proxy_cams=("ids", cams[:9]),
                                                      positives=("count", 2), balance=("number", 0.2))),
}
if importlib.util.find_spec("faiss"):
    CALLS["knn_approximate"] = (neighbors.knn_approximate, dict(features=("matrix", x), k=("count", 3), cells=("count", 3), probes=("count", 2), sample=("count", 10), seed=("count", 1)))
if importlib.util.find_spec("infomap"):
    CALLS["infomap"] = (clustering.infomap, dict(features=("matrix", x), k=("count", 5), min_similarity=("number", 0.5), min_size=("count", 2)))


def spoilt(array, rows, value):
    out = np.array(array, np.float64)
    out[rows] = value
    return out


WORDS = {"a string": "many", "nothing": None, "a dict": {}, "an object": object(), "a complex": 1j, "a ragged list": [[1, 2], [3]], "strings": ["a"] * N, "a bool": True}
COUNTS = WORDS | {"0": 0, "-1": -1, "2.5": 2.5, "nan": np.nan, "inf": np.inf, "huge": 10 ** 9, "3.0": 3.0, "numpy": np.int32(2), "a string of it": "3", "a list": [2], "1": 1, "N": N, "N + 1": N + 1}
NUMBERS = WORDS | {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "-1": -1.0, "0": 0, "1": 1, "1e30": 1e30, "2": 2.0, "a string of it": "0.5", "an array": np.ones(3)}


def arrays(a):
    "Bad and odd relatives of an array."
    a = a.toarray() if sp.issparse(a) else np.asarray(a)
    floats = a.astype(np.float64)
    return WORDS | {"NaN": spoilt(a, 1, np.nan), "Inf": spoilt(a, 1, np.inf), "1e20": spoilt(a, 1, 1e20), "1e300": spoilt(a, 1, 1e300), "1e-30": floats * 1e-30, "zeros": 0 * floats,
                    "one row": a[:1], "no row": a[:0], "one row less": a[:-1], "a row more": np.concatenate([a, a[:1]]), "0-d": np.float64(3), "flat": a.ravel(), "deeper": a[None], "a column": a[..., :1],
                    "no column": a[..., :0], "a list": a.tolist(), "an empty list": [], "float64": floats, "float16": a.astype(np.float16), "a tensor": torch.from_numpy(floats),
                    "integers": a.astype(np.int64), "bools": a > 0, "complex": a + 1j, "text": a.astype(str), "objects": a.astype(object), "halves": floats + .5, "negative": -floats - 1,
                    "far": np.full(a.shape, 10 ** 6), "uint64": np.full(a.shape, 2 ** 64 - 1, np.uint64), "fortran": np.asfortranarray(a), "read-only": np.broadcast_to(a[:1], a.shape), "wide": np.concatenate([a, a], -1)}


def bad_values(kind, good):
    if kind == "count": return COUNTS
    if kind == "number": return NUMBERS
    if kind == "given": return {}
    if kind == "nodes": return WORDS | {"out of range": {0: N}, "negative": {0: -1}, "a name": {0: "a"}, "NaN": {0: np.nan}, "half": {0: .5}}
    return arrays(good)


CASES = [(name, argument, what) for name, (_, arguments) in CALLS.items() for argument, (kind, good) in arguments.items() for what in bad_values(kind, good)]


def leaves(result):
    "All arrays and numbers of a result."
    if isinstance(result, torch.Tensor): return [result.detach().numpy()]
    if sp.issparse(result): return [result.toarray()]
    if isinstance(result, dict): return [v for r in result.values() for v in leaves(r)]
    if isinstance(result, (tuple, list)): return [v for r in result for v in leaves(r)]
    if hasattr(result, "__dict__") and not isinstance(result, np.ndarray): return leaves(vars(result))
    return [np.asarray(result)]


LOSSES = {"info_nce", "ClusterMemory", "HybridMemory", "soft_triplet_loss", "pglr_loss", "aals_loss", "inter_camera_loss", "mean_update", "hard_update", "fuse", "fuse_similarities", "extract_features",
          "support_samples", "label_preserving_loss", "released_label_preserving_loss", "offline_loss", "online_loss", "online_positives", "weighted_loss", "camera_loss", "prototype_loss", "update_prototypes", "instance_loss", "refresh_instances"}


def sane(name, argument, what, result):
    "Finite, apart from losses, where NaN in is NaN out; labels are labels; indices are rows."
    for a in leaves(result):
        if a.dtype.kind == "f" and name not in LOSSES and not (name.startswith("evaluate") and a.ndim): assert np.isfinite(a).all(), a
    if name in ("dbscan", "agglomerative", "infomap", "correct_labels", "decode", "refine_labels"): assert result.dtype.kind == "i" and result.min(initial=0) >= -1
    if name == "knn": assert result[1].min() >= 0 and result[1].max() < len(result[1]) and (np.diff(result[0]) <= 0).all()
    if name.startswith("evaluate"): assert 0 < result.mAP <= 1 and (np.diff(result.cmc) >= 0).all() and result.cmc[-1] <= 1
    if name.startswith("jaccard") and result.nnz: assert 0 <= result.data.min() and result.data.max() <= 1
    if name == "label_quality": assert all(0 <= v <= 1 for k, v in result.as_dict().items() if isinstance(v, float) and k != "ari")


def call(name, **changed):
    function, arguments = CALLS[name]
    given = {k: good for k, (_, good) in arguments.items()} | changed
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return function(**given)


@pytest.mark.parametrize("name", list(CALLS))
def test_good_arguments_pass(name):
    sane(name, "", "", call(name))


@pytest.mark.parametrize("name", list(CALLS))
def test_one_argument_spoilt(name):
    "All bad values of all arguments; the failures of a call are listed together."
    wrong = []
    for _, argument, what in [case for case in CASES if case[0] == name]:
        value = bad_values(*CALLS[name][1][argument])[what]
        try: sane(name, argument, what, call(name, **{argument: value}))
        except ValueError as e:
            place = traceback.extract_tb(e.__traceback__)[-1].filename
            if "reidbook" not in place or len(str(e)) < 20: wrong.append(f"{argument}={what}: {place.split('/')[-1]}: {e}")
        except BaseException as e: wrong.append(f"{argument}={what}: {type(e).__name__}: {str(e)[:150]}")
    assert not wrong, f"{len(wrong)} of {name}\n" + "\n".join(wrong)


def test_nothing_is_forgotten():
    "Every public function of the numeric modules is in the table, or named here with a reason."
    covered = {function.__name__ for function, _ in CALLS.values()} | {"jaccard_similarity", "infomap", "knn_approximate", "correct_labels"}
    covered |= {"compiled", "compiled_loosely", "in_threads", "full_precision", "products", "on_device"}  # machinery, without data of the reader's
    covered |= {"as_array", "as_lists", "as_neighbors", "as_count", "as_number", "as_batch", "as_graph"}  # the checks themselves: every row above goes through them
    covered |= {"stacked_heads", "class_means", "add_classifiers", "remove_classifiers", "weigh"}  # parts of an epoch: they get what the loop has made
    for module in (neighbors, clustering, noise, memory, evaluation):
        for name in module.__all__:
            function = getattr(module, name)
            if not inspect.isfunction(function) or name.startswith(("plot_", "show_")): continue
            assert name in covered, f"{module.__name__}.{name}"


def test_nan_identities_are_refused():
    "They gave an mAP of 1.0."
    pids = np.where(np.arange(N) < 3, np.nan, labels)
    with pytest.raises(ValueError, match="g_pids: found values that are not whole numbers"): call("evaluate", g_pids=pids[:16])
    with pytest.raises(ValueError, match="q_pids"): call("evaluate", q_pids=pids[:8])


@pytest.mark.parametrize("value, words", [(np.nan, "NaN or Inf"), (np.inf, "NaN or Inf"), (1e20, "longer than 4e18")])
def test_rows_that_cannot_be_multiplied_are_named(value, words):
    with pytest.raises(ValueError, match=f"{words} .*rows 3, 7"): neighbors.knn(spoilt(x, [3, 7], value), 3)


def test_one_column_and_lists_longer_than_the_gallery():
    line = np.linspace(.1, 1, N)[:, None]
    assert (neighbors.knn(line, N + 5)[1] == np.arange(N)[::-1]).all()
    lists = evaluation.rank_lists(line[:2], line[2:], k=N)
    assert lists.shape == (2, N) and (lists[:, N - 2:] == -1).all() and sorted(lists[0, :N - 2]) == list(range(N - 2))
