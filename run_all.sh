#!/usr/bin/env bash
# The whole comparison, from a data set to the report. To resume it, run the same command again: what is done stays.
#
#   bash run_all.sh                     digits: four runs of five seeds; embedded, minutes on a CPU
#   bash run_all.sh cifar10             CIFAR-10 (ROOT=folder where it lies), an evening of one GPU (estimated)
#   QUICK=1 bash run_all.sh cifar10     full, random, Gaussian at 10 % and D2C, short: 25 minutes of one GPU
#                                       (estimated); the report is renewed after every run
#   bash run_all.sh FOLDER|FILE         your own images: a folder, .zip, .tar, .npz or .parquet, or hf:NAME
#   bash run_all.sh imagenet FOLDER     D2C's own setting on ImageNet's training images (a folder per class);
#                                       needs downloads: SCORER=DiT-XL-2-256x256.pt REFERENCE=ADM's statistics
#   bash run_all.sh imagenet-pruning FOLDER     Pruning then Reweighting of latent models: MODEL=MDT-S/2, or MODEL=sd
#                                       SD=FOLDER (in diffusers' format); KEEP="0.1 0.4"; prints disk and GPU hours
#   bash run_all.sh test                the fast tests
#
# Sizes come from the environment:
#   STEPS KEEP PER_CLASS NUM_SAMPLES SEEDS SIZE MODEL PROCESS NPROC DEVICE
#   JOBS=n (runs side by side: by default one a GPU; on a CPU one a core, at most 4, where the network is tiny)
#   REPORT=full (eight runs, trajectories, four guidances)  TRAJECTORY=n (of n samples a point)  OUT (default runs/NAME)
# and so do choices:
#   RUNS="full random random-attach pruned pruned-SCORE pruned-dro pruned-dro-resample pruned-dro-permuted d2c-select
#   d2c-select-attach full-short random-short pruned-short" (some of them)
#   JUDGES=n (networks of scratch)  GUIDANCE="1 1.5" (pictures and audit use the first)
#   SCORER_STEPS=n (a weak scorer instead of the full run)  SHORT=n (steps of full-short random-short pruned-short)
#   SURROGATE SCORE (of the run pruned; "gaussian moderate" makes two rows, as RUNS="pruned pruned-moderate" does)
#   TEXT VISUAL INTERVAL JUDGE, and for weights that lie here
#   SURROGATE_WEIGHTS VISUAL_WEIGHTS JUDGE_WEIGHTS; for imagenet VAE OFFICIAL (dit, sit, mdt, repa or empty) IMAGE_SIZE
# and flags for the scripts: DATA_FLAGS (data.py, as "--labels-from prefix") DRO (reweight.py) TRAIN (train.py) SAMPLER
#   (sample.py).
# Output: OUT/<run>/ and OUT/report/report.md; seeds after the first in OUT/<run>-seedN; every command in OUT/plan.txt.
# Which runs there are, with which flags: common/plan.py.
set -euo pipefail
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}        # idle CPU threads sleep at once: on a busy machine they would spin
refuse() { echo "run_all.sh: error: $*" >&2; exit 2; }

# ------------------------------------------------------------------ the data set, and paths as seen from where we are
what=${1:-digits}
what=${what/#\~\//${HOME:-}/} source=$what           # quoted, ~ reaches us as it is
case "$what" in
digits|cifar10|test) ;;
imagenet|imagenet-pruning)
    [ -d "${2:-}" ] || refuse "$what needs the folder of its training images, a sub-folder per class:" \
        "bash run_all.sh $what FOLDER"
    source=$(realpath "$2") ;;
hf:*) what=folder ;;
*)  [ -e "$what" ] || refuse "$what: neither digits, cifar10, imagenet, imagenet-pruning, hf:NAME nor test, and no" \
        "such folder or file"
    source=$(realpath "$what") what=folder ;;
esac
for path in ROOT SURROGATE_WEIGHTS SCORER VISUAL_WEIGHTS JUDGE_WEIGHTS REFERENCE VAE TEXT SD; do
    [ ! -e "${!path:-}" ] || export "$path=$(realpath "${!path}")"
done
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")"

# ------------------------------------------------------------------ a Python that has what requirements.txt asks for
packages="torch torchvision numpy scipy PIL tqdm einops pytorch_fid matplotlib pytest xdist sklearn"
complete() {
    "$1" -c "import importlib.util as u, sys
sys.exit(sys.version_info < (3, 10) or any(u.find_spec(p) is None for p in '$packages'.split()))" 2>/dev/null
}
py=python3
if [ -e .venv ] || ! complete python3; then
    py=.venv/bin/python
    if ! complete "$py"; then
        echo "installing requirements.txt into .venv (several GB with CUDA; only this once)"
        python3 -c "import sys; sys.exit(sys.version_info < (3, 10))" || refuse "Python 3.10 or newer is needed"
        python3 -m venv .venv
        "$py" -m pip install -q -r requirements.txt
    fi
fi

# ------------------------------------------------------------------ go
if [ "$what" = test ]; then
    exec "$py" -m pytest -q -n 2 --dist loadfile -m "not slow" tests "${@:2}"
fi
exec "$py" -m common.run_all "$what" "$source"
