"""The study: a grid of runs without papermill, many side by side, on a bare machine with torch.

    python tests/gpu/study.py nbs/results/study.yaml --out study.jsonl --workers 8

Each finished run is one line of OUT. A run that has its line is not made again: stop it when you like, and
start it again. `--limit` seconds after the start no run is begun, and those at work are given up."""
import argparse
import json
import multiprocessing as mp
import os
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]


def key(run):
    "What tells runs apart."
    return json.dumps([run[k] for k in ("dataset", "method", "settings", "seed")], sort_keys=True)


def train(run, device):
    "One run, from the start network to the last test, as a flat record."
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from reidbook import runs, training
    torch.set_num_threads(1)
    steps = [0]
    def count(*_): steps[0] += 1
    handle = register_optimizer_step_post_hook(count)
    began, clock = time.time(), time.process_time()
    try:
        described = runs.describe(run["dataset"], run["method"], run["seed"], None, device, run["settings"])
        t = training.start(described.dataset, described.method, described.settings, run["seed"], device=device)
        for _ in training.epochs(t): pass
    finally: handle.remove()
    seen = [{k: r.get(k) for k in ("epoch", "mAP", "rank1", "clusters", "outliers", "label_pairwise_precision",
                                   "label_pairwise_recall", "label_pairwise_f", "label_bcubed_f")} for r in t.history]
    return {**run, "steps": steps[0], "seconds": round(time.time() - began, 1),
            "cpu_seconds": round(time.process_time() - clock, 1), "device": device.split(":")[0],
            "code": described.identity["code"], "data": described.identity["data"], "epochs": seen}


def work(device, tasks, results):
    "A worker: one run after another, until there are none."
    os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"
    while (run := tasks.get()) is not None:
        try: results.put(train(run, device))
        except Exception as e:
            traceback.print_exc()
            results.put({**run, "error": f"{type(e).__name__}: {e}"[:300]})
    results.put(None)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("grid")
    p.add_argument("--out", required=True)
    p.add_argument("--workers", type=int, default=1, help="on the device")
    p.add_argument("--cpu-workers", type=int, default=0, help="beside them, on the CPU")
    p.add_argument("--device", default="cpu")
    p.add_argument("--limit", type=float, default=1e9)
    args = p.parse_args()
    from reidbook.batch import read_grid
    out, began = Path(args.out), time.time()
    done = {key(json.loads(line)) for line in out.read_text().splitlines()} if out.exists() else set()
    wanted = [run for run in read_grid(args.grid) if key(run) not in done]
    wanted.sort(key=lambda run: run["seed"])  # whole rounds of seeds, as far as the time goes
    from reidbook.data import open_dataset
    for name in dict.fromkeys(run["dataset"] for run in wanted): open_dataset(name)
    context = mp.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    for run in wanted: tasks.put(run)
    places = [args.device] * args.workers + ["cpu"] * args.cpu_workers
    for _ in places: tasks.put(None)
    pool = [context.Process(target=work, args=(place, tasks, results), daemon=True) for place in places]
    for process in pool: process.start()
    alive = len(pool)
    while alive:
        left = args.limit - (time.time() - began)
        if left <= 0: break
        try: row = results.get(timeout=min(left, 5))
        except Exception:
            if not any(process.is_alive() for process in pool): break
            continue
        if row is None: alive -= 1
        elif "error" in row: print("FAILED", key(row), row["error"], flush=True)
        else:
            with out.open("a") as f: f.write(json.dumps(row) + "\n")
            print(f"{time.time() - began:5.0f} s  {row['dataset']} {row['method']} {row['settings']} seed {row['seed']}: "
                  f"mAP {row['epochs'][-1]['mAP']:.3f}, {row['seconds']:.0f} s, {row['device']}", flush=True)
    for process in pool: process.kill()


if __name__ == "__main__": main()
