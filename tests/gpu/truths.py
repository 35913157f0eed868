"""What must be equal on a GPU and on a CPU. Each truth is a function that measures a difference.

`TRUTHS` maps a name to the function and to the largest difference allowed. With REIDBOOK_GPU_TRUTHS=cpu
the same functions run on a CPU: a rehearsal, which shows that they work, and nothing about a GPU."""
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from reidbook import clustering, evaluation, neighbors, runs, training
from reidbook.bench import seeded_features
from reidbook.data import open_dataset
from reidbook.images import train_transform
from reidbook.models import create_model, extract_features

DEVICE = os.environ.get("REIDBOOK_GPU_TRUTHS", "cuda")
SHORT = dict(epochs=1, iterations=3, precision="float32")
METHODS = {"baseline": ("baseline", {}), "pplr": ("pplr", {}), "pplr, camera": ("pplr", {"camera": True}),
           "icsr": ("icsr", {}), "mprd": ("mprd", {}), "purification": ("purification", {}),
           "glc": ("glc", {"glc_start": 0})}  # the correction is in the first epoch


def relative(a, b):
    "Largest difference, as a part of the largest absolute value."
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-12))


def exact_rows(n=3000, dim=64):
    "Unit rows whose products are exact in float32, with many equal ones: order is the tie rule's alone."
    rng = np.random.default_rng(0)
    return (rng.choice([-1, 1], (n, dim)) / 8).astype(np.float32)


def search_ties():
    "Share of entries in the lists that differ."
    x = exact_rows()
    (a, i), (b, j) = (neighbors.knn(x, 30, device=d) for d in ("cpu", DEVICE))
    return float((i != j).mean() + (a != b).mean())


def search_features():
    "Similarities of the lists, computed again in float64: a wrong neighbour would be less similar."
    x, _ = seeded_features(5000, 256)
    wide = x.astype(np.float64)
    lists = [neighbors.knn(x, 30, device=d)[1] for d in ("cpu", DEVICE)]
    return relative(*(np.einsum("nd,nkd->nk", wide, wide[i]) for i in lists))


def jaccard_ties():
    x = exact_rows()
    a, b = (neighbors.jaccard_similarity(x, device=d) for d in ("cpu", DEVICE))
    return float(abs(a - b).max())


def labels():
    "Share of images whose cluster differs, on features with gaps."
    x, _ = seeded_features(5000, 256)
    a, b = (clustering.dbscan(neighbors.jaccard_similarity(x, device=d), 0.6) for d in ("cpu", DEVICE))
    return float((a != b).mean())


def re_ranking():
    x = exact_rows(1200)
    a, b = (neighbors.re_rank(x[:200], x[200:], device=d) for d in ("cpu", DEVICE))
    return relative(a, b)


def scores():
    "mAP, mINP and the curve of ranks."
    x, pids = seeded_features(6000, 256, noise=2.0)
    cams = np.random.default_rng(1).integers(0, 6, len(x))
    ids = pids[:1000], pids[1000:], cams[:1000], cams[1000:]
    a, b = (evaluation.evaluate(x[:1000], x[1000:], *ids, device=d) for d in ("cpu", DEVICE))
    return max(abs(a.mAP - b.mAP), abs(a.mINP - b.mINP), float(np.abs(a.cmc - b.cmc).max()))


def tiny(): return open_dataset("synthetic-tiny")


def augmentation():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, 3, 64, 32), np.uint8))
    views = [train_transform(images.to(d), torch.Generator().manual_seed(1), flip=0.5, pad=4, erase=0.5, jitter=0.2)
             for d in ("cpu", DEVICE)]
    return relative(*(v.cpu().numpy() for v in views))


def network(backbone, weights, size):
    images = np.random.default_rng(0).integers(0, 256, (32, 3, *size), np.uint8)
    model, _ = create_model(backbone, weights)
    return relative(*(extract_features(model, images, device=d).global_ for d in ("cpu", DEVICE)))


def small_network(): return network("small", "pretrained", (64, 32))
def resnet50(): return network("resnet50", "none", (256, 128))
def transformer(): return network("vit_small", "none", (256, 128))


def bfloat16():
    "1 - the smallest cosine between features in float32 and in bfloat16."
    t = training.start(tiny(), *method("baseline", precision="bfloat16"), device=DEVICE)
    quick = training.features(t, t.images).global_
    exact = training.features(training.start(tiny(), *method("baseline"), device=DEVICE), t.images).global_
    return float(1 - (exact * quick).sum(1).min())


def method(name, **settings):
    module, own = METHODS[name]
    cls = runs.get_method(module)
    return cls, training.resolve(cls, "synthetic-tiny", **SHORT | own | settings)


def first_epoch(name, device, known, **settings):
    """Losses of one short epoch from the same start. `known` holds the features of all images, whenever they
    were asked for: filled when it is empty, used when it is not. A neighbour list jumps where two
    similarities are equal up to rounding, and this truth is about the steps."""
    def given(t, images, *model):
        if not replay: known.append(make(t, images, *model))
        feats = known.pop(0) if replay else known[-1]
        return type(feats)(*(None if x is None else x.copy() for x in feats))
    replay, make = bool(known), training.features
    training.features = given
    try:
        t = training.start(tiny(), *method(name, **settings), device=device)
        record = next(iter(training.epochs(t)))
    finally: training.features = make
    first, last = (list(record).index(k) for k in ("lr", "loss"))
    return {k: record[k] for k in list(record)[first + 1:last + 1]}  # the terms and their sum


def losses(name):
    "Largest difference of a loss, as a part of its value."
    made = []
    a, b = (first_epoch(name, d, made) for d in ("cpu", DEVICE))
    found = {k: abs(a[k] - b[k]) / max(abs(a[k]), 1e-3) for k in a}
    print("   ", name, {k: (a[k], b[k]) for k in a}, flush=True)
    return max(found.values())


def losses_of(name): return lambda: losses(name)


def compiled():
    "Losses with and without torch.compile, both on the device."
    made = []
    a, b = (first_epoch("baseline", DEVICE, made, compile=c) for c in (False, True))
    return abs(a["loss"] - b["loss"]) / a["loss"]


def resumed():
    "mAP of a run that stopped after its first epoch and went on, against the run that did not."
    def run(out, stop=None):
        t = training.start(tiny(), *method("baseline", epochs=2, precision="bfloat16"), out=out, device=DEVICE)
        for record in training.epochs(t):
            if record["epoch"] == stop: break
        return record
    with tempfile.TemporaryDirectory() as folder:
        whole = run(Path(folder, "whole"))
        run(Path(folder, "two"), stop=1)
        again = run(Path(folder, "two"))
    return abs(whole["loss"] - again["loss"]) / whole["loss"]


def waits(name, iterations):
    "How often the processor waited for the GPU in an epoch of so many steps."
    if DEVICE == "cpu": return 0
    import warnings
    t = training.start(tiny(), *method(name), device=DEVICE)
    next(iter(training.epochs(t)))  # prepared and warm
    training.seed_epoch(t)
    t.plan = training.Plan(iterations, 1e-3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try: training.train_epoch(t)
        finally: torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in said)


def waits_per_step(name): return lambda: (waits(name, 8) - waits(name, 2)) / 6


TRUTHS = {
    "search, exact products: lists and ties": (search_ties, 0),
    "search, features: similarity of the lists": (search_features, 1e-6),
    "Jaccard similarity, exact products": (jaccard_ties, 0),
    "labels of 5,000 features": (labels, 0.001),
    "re-ranking, exact products": (re_ranking, 1e-6),
    "mAP, mINP and CMC": (scores, 1e-5),
    "augmentation": (augmentation, 1e-5),
    "features, small network": (small_network, 1e-3),
    "features, ResNet-50": (resnet50, 1e-3),
    "features, ViT-S": (transformer, 1e-3),
    "features in bfloat16: 1 - cosine": (bfloat16, 0.01),
} | {f"losses of three steps, {name}": (losses_of(name), 0.01) for name in METHODS} | {
    "compiled or not: loss": (compiled, 0.001),
    "stopped and resumed: loss": (resumed, 0.01),
} | {f"waits for the GPU in a step, {name}": (waits_per_step(name), 0.5) for name in METHODS}


def exactly():
    "float32 means float32: no TF32 in convolutions while truths are measured."
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
