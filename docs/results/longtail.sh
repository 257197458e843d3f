#!/usr/bin/env bash
# A long tail of digits, 100 images of one class down to 10 of another: do DRO's class weights help the classes behind?
# Beside them the same images unweighted, weighted by inverse frequency, and with DRO's weights of other classes.
# 5 000 samples a run, so that every class is judged by 500. About an hour on two cores; goes on where it was stopped.
#
#   bash docs/results/longtail.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
out=${1:-runs/longtail}
runs="full longtail longtail-dro longtail-inverse longtail-permuted"
python data.py digits --out data/digits

# keep.npy of a seed, which also says what class is how frequent; inverse.npy averages 1 over the images, as weights do
draw='import sys, numpy as np
out, seed = sys.argv[1:]
labels = np.load("data/digits/labels.npy")
rng = np.random.default_rng(int(seed))
counts = np.empty(10, int)
counts[rng.permutation(10)] = np.round(100 * 10 ** (-np.arange(10) / 9))
keep = [rng.choice(np.flatnonzero(labels == k), counts[k], replace=False) for k in range(10)]
np.save(f"{out}/keep.npy", np.sort(np.concatenate(keep)))
weights = 1 / counts
np.save(f"{out}/inverse.npy", (weights * counts.sum() / (weights * counts).sum()).astype(np.float32))'

all=""
for seed in 0 1 2; do
    tail=$([ $seed = 0 ] || echo "-seed$seed")
    set=$out/set$tail weights=$out/reweight$tail
    mkdir -p "$set"
    [ -e "$set/inverse.npy" ] || python -c "$draw" "$set" $seed
    train() { python train.py --data data/digits --preset digits --seed $seed "${@:2}" --out "$out/$1$tail"; }
    train full
    python reweight.py --data data/digits --indices "$set/keep.npy" --reference "$out/full$tail/last.pt" --eta 0.05 \
        --steps 400 --batch-size 64 --seed $seed --out "$weights"
    train longtail --indices "$set/keep.npy"
    train longtail-dro --indices "$set/keep.npy" --weights "$weights/weights.npy"
    train longtail-inverse --indices "$set/keep.npy" --weights "$set/inverse.npy"
    train longtail-permuted --indices "$set/keep.npy" --weights "$weights/weights_permuted.npy"
    for run in $runs; do
        python sample.py --checkpoint "$out/$run$tail/last.pt" --num 5000 --cfg 1 1.25 --sampler heun --steps 12 \
            --seed $seed --out "$out/$run$tail"
        all="$all $out/$run$tail"
    done
done
python evaluate.py --data data/digits --runs $all --encoder scratch
python report.py $all --out "$out/report"
