"""The independent reference: dense, slow, obvious. N x N everywhere, one image at a time, nothing shared with the product.

`tests/` compare the engine with it and `reidbook bench` times the engine against it. It follows the description of the published
computation (dense k-reciprocal Jaccard + scikit-learn's dense precomputed DBSCAN + one scikit-learn average precision per query).
"""
import numpy as np


def ranks(features, k):
    """Full search: N x k indices (self included), N x k similarities. Up to 2048 rows in float64, ties by lower index;
    beyond, the flat faiss index that the published code uses."""
    x = np.asarray(features, np.float32)
    n, k = len(x), min(k, len(features))
    if n > 2048:
        import faiss
        index = faiss.IndexFlatIP(x.shape[1])
        index.add(x)
        sims, rank = index.search(x, k)
        return rank, sims
    wide = x.astype(np.float64)                              # row by row: exact copies get exactly equal products
    s = np.stack([(wide * row).sum(axis=1) for row in wide])
    rank = np.argsort(-s, axis=1, kind="stable")[:, :k]
    return rank, np.take_along_axis(s, rank, 1).astype(np.float32)


def _reciprocal(rank, i, size):
    forward = rank[i, :size]
    return forward[(rank[forward, :size] == i).any(axis=1)]


def _encode(rank, full, half, weight):
    "Dense V: row i = normalised weights over the expanded k-reciprocal set of i."
    n = len(rank)
    half_sets = [_reciprocal(rank, i, half) for i in range(n)]
    where = [frozenset(h.tolist()) for h in half_sets]
    v = np.zeros((n, n), np.float32)
    for i in range(n):
        base = _reciprocal(rank, i, full)
        own, grown = set(base.tolist()), set(base.tolist())
        for c in base:
            if 3 * len(where[c] & own) > 2 * len(where[c]):
                grown |= where[c]
        grown = np.array(sorted(grown), np.int64)
        if len(grown):
            w = weight(i, grown)
            v[i, grown] = w / w.sum()
    return v


def _expand(v, rank, k2):
    if k2 == 1:
        return v
    out = np.empty_like(v)
    for i in range(len(v)):
        out[i] = v[rank[i, :k2]].mean(axis=0)
    return out


def _min_sum_distance(v, rows):
    "1 - m / (2 - m) for the given rows against all, through the inverted lists."
    columns = [np.where(v[:, j] != 0)[0] for j in range(v.shape[1])]
    out = np.empty((len(rows), len(v)), np.float32)
    for a, i in enumerate(rows):
        m = np.zeros(len(v), np.float32)
        for j in np.where(v[i] != 0)[0]:
            m[columns[j]] += np.minimum(v[i, j], v[columns[j], j])
        out[a] = 1 - m / (2 - m)
    return np.maximum(out, 0, out=out)


def jaccard_distance(features, k1=30, k2=6, rank=None):
    "N x N Jaccard distance of k-reciprocal encodings; `rank`: neighbour lists to use instead of searching."
    x = np.asarray(features, np.float32)
    rank = ranks(x, k1)[0] if rank is None else np.asarray(rank)
    half = min(int(np.around(k1 / 2)) + 1, rank.shape[1])   # numpy rounds half to even

    def weight(i, members):
        logit = -(2 - 2 * (x[members] @ x[i]))
        return np.exp(logit - logit.max())

    return _min_sum_distance(_expand(_encode(rank, rank.shape[1], half, weight), rank, k2), np.arange(len(x)))


def dbscan(distance, eps, min_samples=4, tie=1e-5):
    "scikit-learn's DBSCAN on the dense matrix, under the tie rule (close = distance <= eps + 1e-5)."
    from sklearn.cluster import DBSCAN
    return DBSCAN(eps=eps + tie, min_samples=min_samples, metric="precomputed").fit_predict(distance)


def rerank(query_gallery, query_query, gallery_gallery, k1=20, k2=6, lambda_value=0.3):
    "Classic k-reciprocal re-ranking from three blocks of squared distances: Q x G."
    d = np.block([[query_query, query_gallery], [query_gallery.T, gallery_gallery]]).astype(np.float32) ** 2
    d = (d / d.max(axis=0)).T
    rank = np.argsort(d, axis=1, kind="stable").astype(np.int64)
    q = len(query_gallery)
    full, half = k1 + 1, int(np.around(k1 / 2)) + 1
    v = _expand(_encode(rank, full, half, lambda i, members: np.exp(-d[i, members])), rank, k2)
    return (1 - lambda_value) * _min_sum_distance(v, range(q))[:, q:] + lambda_value * d[:q, q:]


def evaluate(similarity, q_pids, g_pids, q_cams=None, g_cams=None, top=100):
    "One query at a time with scikit-learn's average precision; ties of the first and last hit count against us."
    from sklearn.metrics import average_precision_score
    aps, inps, cmc, valid = [], [], np.zeros(top), 0
    for i in range(len(similarity)):
        keep = np.ones(len(g_pids), bool)
        if q_cams is not None:
            keep = (g_pids != q_pids[i]) | (g_cams != q_cams[i])
        s, hit = similarity[i][keep], (g_pids == q_pids[i])[keep]
        if not hit.any():
            aps.append(np.nan)
            continue
        valid += 1
        aps.append(average_precision_score(hit, s))
        first = (s[~hit] >= s[hit].max()).sum()              # rank of the first hit, from 0
        cmc[first:] += 1
        inps.append(hit.sum() / (s >= s[hit].min()).sum())
    return dict(ap=np.array(aps), mAP=np.nanmean(aps), cmc=cmc / valid, mINP=np.mean(inps))
