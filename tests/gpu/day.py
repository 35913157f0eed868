"""The GPU day: first what must be true on a GPU, then what it costs. `make gpu`, or `python tests/gpu/day.py`.

Needs torch, torchvision, numpy, scipy, pandas, numba and Pillow; no faiss, papermill or nbdev. Parts stand in
order of worth. Each part is written to OUT as soon as it is measured, and a part that is there is not
measured again: a machine that is lent for fifteen minutes gives what it can. nbs/19d_gpu.ipynb shows the result."""
import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]

import numpy as np
import torch

from reidbook import bench, clustering, evaluation, neighbors, runs, speed
from reidbook.models import create_model, extract_features


def seconds(function, device, repeats=3):
    "Seconds of the fastest of some calls, the GPU's work included."
    best = np.inf
    for _ in range(repeats):
        clock = time.perf_counter()
        function()
        if device == "cuda": torch.cuda.synchronize()
        best = min(best, time.perf_counter() - clock)
    return best


def gpu_peak(device):
    "Peak memory on the GPU in MB since the last call; None on a CPU."
    if device == "cpu": return None
    peak = torch.cuda.max_memory_allocated() / 2 ** 20
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return peak


def truths(device):
    "Every truth: the difference found, the difference allowed."
    os.environ["REIDBOOK_GPU_TRUTHS"] = device
    from truths import TRUTHS, exactly
    exactly()
    rows = []
    for name, (measure, allowed) in TRUTHS.items():
        clock = time.perf_counter()
        try: row = {"difference": measure()}
        except Exception as e:
            traceback.print_exc()
            row = {"difference": None, "error": f"{type(e).__name__}: {e}"[:300]}
        held = row["difference"] is not None and row["difference"] <= allowed
        rows.append({"truth": name, "allowed": allowed, "held": held, **row, "seconds": time.perf_counter() - clock})
        print(f"  {'held' if held else 'NOT HELD':9s}{name}: {row['difference']}", flush=True)
    return rows


def labels(device, n, dim=2048, beside_cpu=True):
    "Search on the device, the rest of the labels on the CPU, beside the search on the CPU."
    x, _ = bench.seeded_features(n, dim)
    neighbors.knn(x[:4096], 30, device=device)
    clustering.dbscan(neighbors.jaccard_similarity(x[:300]), 0.6)  # compiles
    gpu_peak(device)
    repeats, found = 3 if n < 200_000 else 1, []
    search = seconds(lambda: found.append(neighbors.knn(x, 30, device=device)), device, repeats)
    row = {"n": n, "dim": dim, "search_s": search, "gpu_mb": gpu_peak(device)}
    def rest(neighbours):
        graph = neighbors.jaccard_similarity(x, neighbors=neighbours, min_similarity=clustering.min_similarity(0.6))
        return clustering.dbscan(graph, 0.6)
    clock = time.perf_counter()
    ours = rest(found[-1])
    row |= {"rest_s": time.perf_counter() - clock, "clusters": int(ours.max() + 1)}
    if beside_cpu:
        on_cpu = []
        row["cpu_search_s"] = seconds(lambda: on_cpu.append(neighbors.knn(x, 30, device="cpu")), "cpu", 1)
        row["other_labels"] = float((rest(on_cpu[0]) != ours).mean())
    return row


def scoring(device, queries, gallery, dim=2048):
    "Evaluation on the device and on the CPU."
    x, pids = bench.seeded_features(queries + gallery, dim, per_identity=25)
    cams = np.random.default_rng(1).integers(0, 6, len(x))
    given = x[:queries], x[queries:], pids[:queries], pids[queries:], cams[:queries], cams[queries:]
    evaluation.evaluate(*(g[:500] for g in given), device=device)
    row = {"queries": queries, "gallery": gallery, "dim": dim}
    return row | {f"{d}_s": seconds(lambda: evaluation.evaluate(*given, device=d), d, 2) for d in dict.fromkeys((device, "cpu"))}


def feature_speed(device, backbone, size, n=2048):
    "Images a second through a network in evaluation mode, in float32 and as a run does it."
    from types import SimpleNamespace
    from reidbook import training
    images = np.random.default_rng(0).integers(0, 256, (n, 3, *size), np.uint8)
    model, _ = create_model(backbone, "none")
    model.to(device)
    row = {"network": backbone, "size": f"{size[0]}x{size[1]}"}
    def speed_of(): return n / seconds(lambda: extract_features(model, images, 512, device), device, 2)
    extract_features(model, images[:512], 512, device)
    row["float32"] = speed_of()
    t = SimpleNamespace(model=model, device=torch.device(device), settings=SimpleNamespace(compile=False, precision="bfloat16", bn_group_size=0))
    training.quicken(t)
    extract_features(model, images[:512], 512, device)
    return row | {"bfloat16": speed_of(), "gpu_mb": gpu_peak(device)}


def training_speed(device, dataset, batches=40, **settings):
    "This loop beside the plain one."
    gpu_peak(device)
    row = speed.bench_train(dataset, device, batches, **settings)
    return row | {"compile": settings.get("compile", False), "gpu_mb": gpu_peak(device)}


def parts(quick):
    "Name -> what to call with the device, in order of worth."
    if quick:
        tiny = dict(dataset="synthetic-tiny", batches=2)
        return {"labels 2,000": lambda d: labels(d, 2000, 64), "scoring": lambda d: scoring(d, 60, 500, 64),
                "features": lambda d: feature_speed(d, "small", (64, 32), 64),
                "training": lambda d: training_speed(d, **tiny)}
    big = dict(dataset="synthetic-small", backbone="resnet50", batch_size=256, instances=16, bn_group_size=64)
    tall = dict(height=256, width=128)
    return {
        "truths": truths,
        "training, ResNet-50 256x128": lambda d: training_speed(d, **big, **tall),
        "labels 12,936": lambda d: labels(d, 12_936),
        "features, ResNet-50 256x128": lambda d: feature_speed(d, "resnet50", (256, 128)),
        "labels 32,621": lambda d: labels(d, 32_621),
        "training, ResNet-50 384x128": lambda d: training_speed(d, **big, height=384, width=128),
        "scoring, Market-1501": lambda d: scoring(d, 3368, 15_913),
        "labels 100,000": lambda d: labels(d, 100_000, beside_cpu=False),
        "features, ResNet-50 384x128": lambda d: feature_speed(d, "resnet50", (384, 128)),
        "features, ViT-S 256x128": lambda d: feature_speed(d, "vit_small", (256, 128)),
        "scoring, MSMT17": lambda d: scoring(d, 11_659, 82_161),
        "labels 1,000,000": lambda d: labels(d, 1_000_000, 256, beside_cpu=False),
        "training, compiled ResNet-50 256x128": lambda d: training_speed(d, **big, **tall, compile=True),
    }


def machine(device):
    "What it was measured on."
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {"gpu": gpu, "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__, "started": runs.now()}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", default="nbs/results/gpu.json")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    p.add_argument("--quick", action="store_true", help="small forms of the figures: does the script work?")
    p.add_argument("--only", default="", help="parts whose name starts with this")
    p.add_argument("--limit", type=float, default=1e9, help="seconds after which no part is begun")
    args = p.parse_args()
    if args.device == "cpu" and not args.quick:
        sys.exit("this machine has no GPU that torch can see: use --quick to rehearse on the CPU")
    out, began = Path(args.out), time.perf_counter()
    known = json.loads(out.read_text()) if out.exists() else {"machine": machine(args.device), "parts": {}}
    if (known["machine"]["gpu"], known["machine"]["cores"]) != (machine(args.device)["gpu"], machine(args.device)["cores"]):
        sys.exit(f"{out} was measured on another machine ({known['machine']}): give another --out")
    for name, measure in parts(args.quick).items():
        if name in known["parts"] or not name.startswith(args.only): continue
        if time.perf_counter() - began > args.limit: break
        clock = time.perf_counter()
        print(name, flush=True)
        try: known["parts"][name] = measure(args.device)
        except Exception:
            traceback.print_exc()
            continue
        out.write_text(json.dumps(known, indent=1) + "\n")
        print(f"  {time.perf_counter() - clock:.0f} s", json.dumps(known["parts"][name])[:600] if name != "truths" else "", flush=True)


if __name__ == "__main__": main()
