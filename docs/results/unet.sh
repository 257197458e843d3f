#!/usr/bin/env bash
# Which selection is best for a small U-Net? Digits, 15 images a class unless PER_CLASS says another number: random,
# Gaussian, Moderate-DS, herding, and D2C's Select with the intervals auto, 1 (the easiest images) and span (all
# difficulties). About 40 minutes on two cores; goes on where it was stopped.
#
#   bash docs/results/unet.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
unset STEPS NUM_SAMPLES TRAIN SAMPLER JUDGES DATA_FLAGS KEEP INTERVAL TRAJECTORY REPORT QUICK
export PER_CLASS=${PER_CLASS:-15} MODEL=unet-tiny PROCESS=ddpm SEEDS="0 1 2"
export OUT=${1:-runs/unet-$PER_CLASS}
export GUIDANCE="1 1.25 1.5 2" SCORE="gaussian moderate herding" RUNS="full random pruned d2c-select" JUDGE=scratch
bash run_all.sh digits

all=""
for seed in $SEEDS; do
    tail=$([ $seed = 0 ] || echo "-seed$seed")
    for run in full random pruned pruned-moderate pruned-herding d2c-select; do
        all="$all $OUT/$run$tail"
    done
    for interval in 1 span; do
        run=$OUT/d2c-select-k-$interval$tail
        python attach.py --data data/digits --difficulty "$OUT/d2c-select-attach$tail/attach/difficulty.npy" \
            --per-class "$PER_CLASS" --interval $interval --text none --visual none --judge none --seed $seed \
            --out "$run/attach"
        python train.py --data data/digits --preset digits --seed $seed --model unet-tiny --process ddpm --lr 1e-3 \
            --indices "$run/attach/keep.npy" --out "$run"
        python sample.py --checkpoint "$run/last.pt" --num 1000 --cfg $GUIDANCE --sampler dpm++ --steps 20 \
            --seed $seed --out "$run"
        all="$all $run"
    done
done
python evaluate.py --data data/digits --runs $all --encoder scratch
python report.py $all --out "$OUT/report"
