"""The study: a grid of runs side by side, without papermill, on a bare machine with torch.

    python tests/gpu/study.py nbs/results/study.yaml --out nbs/results/study.csv --device cuda --workers 16

Each finished run is one row of OUT. A run that has its row is not made again: stop it when you like, and start
it again. After `--limit` seconds the runs at work are given up. nbs/21a_verdict.ipynb shows the result."""
import argparse
import csv
import json
import multiprocessing as mp
import os
import sys
import time
import traceback
from pathlib import Path
from queue import Empty

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

LABELS = ("clusters", "outliers", "label_pairwise_precision", "label_pairwise_recall", "label_pairwise_f", "label_bcubed_f")
COLUMNS = ("dataset", "method", "settings", "seed", "mAP", "rank1", "curve", *LABELS, "steps", "seconds", "hardware",
           "side_by_side", "code")


def key(run):
    "What tells runs apart."
    return run["dataset"], run["method"], json.dumps(run["settings"], sort_keys=True), str(run["seed"])


def train(run, device):
    "One run, from the start network to the last test, as a row."
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from reidbook import runs, training
    torch.set_num_threads(1)
    steps = []
    handle = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    began = time.time()
    try:
        d = runs.describe(run["dataset"], run["method"], run["seed"], None, device, run["settings"])
        t = training.start(d.dataset, d.method, d.settings, run["seed"], device=device)
        for _ in training.epochs(t): pass
    finally: handle.remove()
    last = t.history[-1]
    curve = " ".join(f"{r['epoch']}:{r['mAP']:.4f}" for r in t.history if "mAP" in r)
    return dict(zip(COLUMNS[:4], key(run))) | {
        "mAP": round(last["mAP"], 6), "rank1": round(last["rank1"], 6), "curve": curve, **{k: last[k] for k in LABELS},
        "steps": len(steps), "seconds": round(time.time() - began, 1), "code": d.identity["code"],
        "hardware": torch.cuda.get_device_name() if device == "cuda" else "CPU"}


def work(device, tasks, results):
    "A worker: one run after another, until there are none."
    while (run := tasks.get()) is not None:
        try: results.put(train(run, device))
        except Exception as e:
            traceback.print_exc()
            results.put({"error": f"{key(run)}: {type(e).__name__}: {e}"[:400]})
    results.put(None)


def missing(grid, out):
    "The runs of a grid that have no row yet, seed by seed: as many whole rounds as the time gives."
    from reidbook.batch import read_grid
    done = set()
    if out.exists(): done = {tuple(row[k] for k in COLUMNS[:4]) for row in csv.DictReader(out.read_text().splitlines())}
    return sorted((run for run in read_grid(grid) if key(run) not in done), key=lambda run: run["seed"])


def keep(out, row):
    "Append a row."
    new = not out.exists()
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new: writer.writeheader()
        writer.writerow(row)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("grid")
    p.add_argument("--out", required=True, type=Path)
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--workers", type=int, default=1, help="runs side by side on the device")
    p.add_argument("--cpu-workers", type=int, default=0, help="more of them, on the CPU")
    p.add_argument("--limit", type=float, default=1e9, help="seconds")
    args = p.parse_args()
    began, wanted = time.time(), missing(args.grid, args.out)
    os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"
    from reidbook.data import open_dataset
    for name in dict.fromkeys(run["dataset"] for run in wanted): open_dataset(name)  # rendered once
    context = mp.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    places = [args.device] * args.workers + ["cpu"] * args.cpu_workers
    for task in wanted + [None] * len(places): tasks.put(task)
    pool = [context.Process(target=work, args=(place, tasks, results), daemon=True) for place in places]
    for process in pool: process.start()
    working, finished = len(pool), 0
    while working and time.time() - began < args.limit and any(process.is_alive() for process in pool):
        try: row = results.get(timeout=2)
        except Empty: continue
        if row is None: working -= 1
        elif "error" in row: print("FAILED", row["error"], flush=True)
        else:
            finished += 1
            keep(args.out, row | {"side_by_side": len(pool)})
            print(f"{time.time() - began:5.0f} s {finished}/{len(wanted)} {row['dataset']} {row['method']} {row['settings']} "
                  f"seed {row['seed']}: mAP {row['mAP']:.3f} in {row['seconds']:.0f} s", flush=True)
    for process in pool: process.kill()


if __name__ == "__main__": main()
