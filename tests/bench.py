"""Measurements that are run by hand; none of them is a test.

    python tests/bench.py prune                    # memory and time of every score on 200 000 x 2 048 features, 1 000 classes (1.6 GB of disk)
    python tests/bench.py prune --only kcenter     # one row of it
    python tests/bench.py prune --size 0.01        # the same on a hundredth, to see that it runs

Each benchmark is a function of BENCHMARKS that prints a table and, for scripts, plain lines `name value`. Scratch files go to a temporary folder
(--scratch) and are deleted.
"""
import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def measure(command):
    """Run a command; (seconds, peak anonymous memory in GB, its output). RssAnon leaves out mapped files: what the kernel can drop at will."""
    start, peak = time.time(), 0
    with tempfile.TemporaryFile("w+") as log:
        p = subprocess.Popen([sys.executable, *map(str, command)], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        while p.poll() is None:
            try:
                peak = max(peak, int(re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{p.pid}/status").read_text())[1]))
            except (TypeError, OSError):                              # it has just ended
                pass
            time.sleep(0.02)
        log.seek(0)
        text = log.read()
    if p.returncode:
        sys.exit(f"{' '.join(map(str, command))}\nended with {p.returncode}:\n{text}")
    return time.time() - start, peak * 1024 / 1e9, text


def prune_data(folder, n, D, classes):
    """A data folder of n grey 8 x 8 images in shuffled classes, and features.npy (n, D): each class its own mean, nearly low rank plus noise."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(n) % classes)
    np.save(folder / "labels.npy", labels)
    np.save(folder / "images.npy", rng.integers(0, 256, (n, 8, 8, 1), dtype=np.uint8))
    whole = folder.with_name("whole")                                 # the same images as one class: 20 picks cannot serve 1 000 classes
    whole.mkdir()
    (whole / "images.npy").symlink_to(folder / "images.npy")
    np.save(whole / "labels.npy", np.zeros_like(labels))
    for f, k in ((folder, classes), (whole, 1)):
        (f / "classes.txt").write_text("".join(f"{c}\n" for c in range(k)))
        (f / "dataset.json").write_text(json.dumps({"name": "bench", "sha256": f"made by bench.py, {k} classes"}))
    means, mix = rng.random((classes, D), np.float32), rng.normal(size=(64, D)).astype(np.float32) / 16
    z = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float32, (n, D))
    for lo in range(0, n, 10_000):
        c = labels[lo:lo + 10_000]
        z[lo:lo + len(c)] = means[c] + rng.standard_normal((len(c), 64), np.float32) @ mix + 0.1 * rng.standard_normal((len(c), D), np.float32)
    z.flush()


def bench_prune(args):
    """Every score per class at 10 %; the features' scores over the whole set as well (the greedy ones with few picks: they cost a pass each)."""
    n, D, classes = int(200_000 * args.size), 2048, max(2, int(1000 * args.size))
    runs = [(s, "class", 0.1, ()) for s in ("random", "gaussian", "moderate", "kcenter", "herding", "cluster")]
    runs += [("el2n", "class", 0.1, ("--el2n-epoch", 1)), ("ccs", "class", 0.1, ("--scores", "el2n"))]
    runs += [(s, "global", 0.5, ()) for s in ("gaussian", "moderate")] + [(s, "global", 20 / n, ()) for s in ("kcenter", "herding", "cluster")]
    print(f"{n} x {D} float32 features ({n * D * 4 / 1e9:.2f} GB), {classes} classes; peak anonymous memory of the whole process\n"
          f"{'score':10} {'scope':7} {'kept':>8} {'RssAnon GB':>11} {'seconds':>8} {'of these scoring':>17}", flush=True)
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="bench_prune_") as tmp:
        data = Path(tmp, "data")
        data.mkdir()
        prune_data(data, n, D, classes)
        lines = []
        for score, scope, keep, more in runs:
            if args.only and score not in args.only:
                continue
            out = Path(tmp, f"{score}_{scope}")
            if more and more[0] == "--scores":
                more = ("--scores", data / "difficulty.npy")
                np.save(more[1], np.random.default_rng(1).random(n))
            flags = () if score in ("random", "el2n", "ccs") else ("--features", data / "features.npy")
            folder = data if scope == "class" else data.with_name("whole")
            seconds, gb, _ = measure([ROOT / "prune.py", "--data", folder, "--out", out, "--score", score, "--scope", scope, "--keep", keep,
                                      *more, *flags])
            record = json.loads((out / "prune.args.json").read_text())
            print(f"{score:10} {scope:7} {record['kept']:8d} {gb:11.2f} {seconds:8.1f} {record['seconds_scores']:17.1f}", flush=True)
            lines.append(f"prune_{score}{'_global' * (scope == 'global')}_rss_gb {gb:.3f}")
        print("\n".join(lines))


BENCHMARKS = {"prune": bench_prune}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("benchmark", choices=tuple(BENCHMARKS))
    p.add_argument("--size", type=float, default=1.0, help="share of the full size")
    p.add_argument("--only", nargs="+", help="these rows alone")
    p.add_argument("--scratch", type=Path, help="folder for temporary files instead of the system's")
    args = p.parse_args(argv)
    BENCHMARKS[args.benchmark](args)


if __name__ == "__main__":
    main()
