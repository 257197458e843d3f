#!/usr/bin/env bash
# The whole comparison, from a data set to the report. Run the same command again to resume it; what is done is skipped.
#
#   bash run_all.sh                     digits: embedded, needs nothing downloaded, minutes on a CPU
#   bash run_all.sh cifar10             CIFAR-10 (ROOT=folder where it already lies), one GPU, an evening
#   QUICK=1 bash run_all.sh cifar10     the same questions with short runs, sized for 25 minutes of one GPU; the report is renewed after every run
#   bash run_all.sh FOLDER|FILE.npz     your own images
#   bash run_all.sh imagenet FOLDER     D2C's own setting on ImageNet's training images (a folder per class); needs downloads, see the block below
#   bash run_all.sh test                the fast tests
#
# Sizes come from the environment: STEPS KEEP PER_CLASS NUM_SAMPLES SEEDS MODEL PROCESS RUNS NPROC DEVICE REPORT=full (trajectories and intervals), TRAJECTORY=n
# (trajectories of n samples a point), and choices: SURROGATE SCORE ("gaussian moderate" makes two rows) TEXT VISUAL INTERVAL JUDGE, flags for the scripts: DRO (reweight.py),
# TRAIN (train.py), SAMPLER (sample.py), and OUT (default runs/NAME, with MODEL and PROCESS behind it where given).
# Output: runs/NAME/<run>/ and runs/NAME/report/report.md. Seeds after the first stand in runs/NAME/<run>-seedN.
set -euo pipefail
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}                      # idle CPU threads sleep at once: on a busy machine they would spin for ages
what=${1:-digits}
[ "${QUICK:-}" != 0 ] || QUICK=
refuse() { echo "run_all.sh: error: $*" >&2; exit 2; }
case "$what" in
digits|cifar10|test) ;;
imagenet) [ -d "${2:-}" ] || refuse "imagenet needs the folder of its training images, a sub-folder per class: bash run_all.sh imagenet FOLDER"
    [ -n "${SCORER:-}" ] || refuse "imagenet needs SCORER=DiT-XL-2-256x256.pt, the diffusion model that scores"
    [ -n "${REFERENCE:-}" ] || refuse "imagenet needs REFERENCE=VIRTUAL_imagenet256_labeled.npz, the statistics that the judge compares with"
    [ -z "${QUICK:-}" ] || refuse "QUICK is for data sets of pixels; for a short imagenet set STEPS and RUNS"
    images=$(realpath "$2") ;;
*)  [ -e "$what" ] || refuse "$what: neither digits, cifar10 nor test, and no such folder or file"
    what=$(realpath "$what") ;;
esac
for path in SURROGATE_WEIGHTS SCORER VISUAL_WEIGHTS JUDGE_WEIGHTS REFERENCE; do
    [ -z "${!path:-}" ] || [ -e "${!path}" ] || refuse "$path=${!path}: no such file"
done
for path in ROOT SURROGATE_WEIGHTS SCORER VISUAL_WEIGHTS JUDGE_WEIGHTS REFERENCE VAE TEXT; do      # of the last two the names of a hub are none of ours
    [ -z "${!path:-}" ] || [ ! -e "${!path}" ] || declare "$path=$(realpath "${!path}")"
done
for list in SEEDS RUNS JUDGE SCORE KEEP; do                           # single spaces, and nothing twice: the same run would count as two seeds
    [ -n "${!list:-}" ] || continue
    declare "$list=$(echo ${!list})"
    [ "$(tr ' ' '\n' <<<"${!list}" | sort | uniq -d)" = "" ] || refuse "$list=\"${!list}\" names something twice"
done
whole='0*[1-9][0-9]{0,11}' share='(0?\.[0-9]*[1-9][0-9]*|[1-9](\.[0-9]+)?e-0*[1-9][0-9]*|1(\.0*)?)'
must() {                                                             # must NAME PATTERN WORDS: a value out of range would show hours later
    [ -z "${!1:-}" ] || [[ ${!1} =~ ^$2$ ]] || refuse "$1=${!1}: must be $3"
}
for size in STEPS NUM_SAMPLES PER_CLASS NPROC SIZE; do must $size "$whole" "a whole number of at least 1"; done
must SEEDS "(0|[1-9][0-9]{0,17})( (0|[1-9][0-9]{0,17}))*" "whole numbers, one for each repetition"
must KEEP "$share( $share)*" "shares of the images to keep, each above 0 and at most 1"
must REPORT "(short|full)" "short or full"
must TRAJECTORY "(all|$whole)" "a number of samples, or all"
must PROCESS "(ddpm|flow)" "ddpm or flow"
must QUICK 1 "1, or 0 for the whole"
known="full random random-attach pruned pruned-dro pruned-dro-resample d2c-select d2c-select-attach"
scores="gaussian moderate kcenter herding cluster random el2n ccs"
encoders="inception resnet18 dinov2_vits14 dinov2_vitb14 dinov2_vitl14 clip ddae scratch pixels"
visuals="resnet18 dinov2_vits14 dinov2_vitb14 dinov2_vitl14 ddae scratch"                      # those that have patch tokens
among() {                                                            # among NAME CHOICES: each word of it must be one of them
    local word; for word in ${!1:-}; do case " $2 " in *" $word "*) ;; *) refuse "$1: $word is none of $2" ;; esac; done
}
among RUNS "$known"; among SCORE "$scores"; among SURROGATE "$encoders"; among VISUAL "none $visuals"; among JUDGE "$encoders"
case "${JUDGE:-}" in
*" ddae"*) refuse "JUDGE=$JUDGE: name ddae first, JUDGE_WEIGHTS are the first judge's" ;;
ddae*) [ -n "${JUDGE_WEIGHTS:-}" ] || refuse "JUDGE=$JUDGE: ddae needs JUDGE_WEIGHTS=CHECKPOINT, a model that neither selected nor is judged" ;;
esac
case "$what" in digits|imagenet) [ -z "${SIZE:-}" ] || refuse "SIZE=$SIZE does nothing with $what" ;; esac
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")"

# ------------------------------------------------------------------ a Python that has what requirements.txt asks for
packages="torch torchvision numpy scipy PIL tqdm einops pytorch_fid matplotlib pytest sklearn"
complete() { "$1" -c "import importlib.util as u, sys; sys.exit(sys.version_info < (3, 10) or any(u.find_spec(p) is None for p in '$packages'.split()))" 2>/dev/null; }
if [ -e .venv ] || ! complete python3; then
    if ! complete .venv/bin/python; then
        echo "installing requirements.txt into .venv (several GB with CUDA; only this once)"
        python3 -c "import sys; sys.exit(sys.version_info < (3, 10))" || refuse "Python 3.10 or newer is needed"
        python3 -m venv .venv
        .venv/bin/python -m pip install -q -r requirements.txt
    fi
    py=.venv/bin/python
else
    py=python3
fi
if [ "$what" = test ]; then
    exec "$py" -m pytest -q -m "not slow" tests "${@:2}"
fi

# ------------------------------------------------------------------ sizes
dro="" sampler="--cfg 1.5" train="" preset=()                         # defaults of DRO, SAMPLER and TRAIN
if [ -n "${QUICK:-}" ]; then                                          # short runs; the learning rate must be up within them
    : "${JUDGE:=scratch}" "${SCORE:=gaussian}" "${TRAJECTORY:=2000}" "${RUNS:=full random pruned random-attach d2c-select d2c-select-attach}"
    if [ "$what" != digits ]; then
        : "${STEPS:=4000}" "${NUM_SAMPLES:=5000}" "${KEEP=0.1}"
        train="--warmup 500 --checkpoint-every 1000"
    fi
fi
case "$what" in
digits)  NAME=digits; source=(digits); preset=(--preset digits); : "${STEPS:=800}" "${PER_CLASS:=15}" "${NUM_SAMPLES:=1000}" "${KEEP:=}"
         sampler="--sampler heun --steps 12 --cfg 1.5"
         [ "${PROCESS:-flow}" = flow ] || sampler="--sampler dpm++ --steps 20 --cfg 1.5"
         case "${MODEL:-}" in unet*) train="$train --lr 1e-3" ;; esac          # the preset's rate is the tiny SiT's
         dro="--eta 0.05 --steps 400 --batch-size 64" ;;
cifar10) NAME=cifar10${SIZE:+-$SIZE}; source=(cifar10 ${ROOT:+--root "$ROOT"} ${SIZE:+--size "$SIZE"})
         [ "${SIZE:-32}" -le 16 ] || preset=(--preset cifar10)                 # small images: the preset that fits them
         : "${STEPS:=20000}" "${PER_CLASS:=100}" "${NUM_SAMPLES:=10000}" "${KEEP:=0.1 0.4}" "${SCORE:=gaussian moderate}" ;;
imagenet) NAME=imagenet; preset=(--preset imagenet); sampler="--sampler sde --steps 250 --cfg 1.5"
         : "${STEPS:=40000}" "${PER_CLASS:=10}" "${INTERVAL:=96}" "${NUM_SAMPLES:=50000}" "${KEEP:=}" "${RUNS:=random random-attach d2c-select d2c-select-attach}"
         : "${TEXT:=google/flan-t5-xl}" "${VISUAL:=dinov2_vitb14}" "${JUDGE:=inception}" ;;
*)       NAME=$(basename "${what%.npz}"); case "$NAME" in digits|cifar10|imagenet) NAME=my-$NAME ;; esac
         [ ! "data/$NAME" -ef "$what" ] || NAME=my-$NAME              # photos in data/photos are not overwritten by what is made of them
         source=("$what" ${SIZE:+--size "$SIZE"}); : "${STEPS:=20000}" "${PER_CLASS:=100}" "${NUM_SAMPLES:=10000}" "${KEEP:=0.1}"
         : "${TEXT:=none}" ;;                                         # minilm knows the class names of digits, CIFAR and ImageNet only
esac
: "${SEEDS:=0}" "${NPROC:=1}" "${DEVICE:=auto}" "${REPORT:=short}" "${RUNS:=full random random-attach pruned pruned-dro d2c-select d2c-select-attach}"
[ "$REPORT" != full ] || RUNS="$RUNS pruned-dro-resample" TRAJECTORY=${TRAJECTORY:-all}          # the other way to use the weights
: "${DRO=$dro}" "${SAMPLER=$sampler}" "${TRAJECTORY:=}" "${TEXT:=minilm}" "${VISUAL:=ddae}" "${SCORE:=gaussian}" "${INTERVAL:=auto}" "${JUDGE:=scratch pixels}"
TRAIN="$train${TRAIN:+ $TRAIN}"                                       # of a flag given twice the last counts
data=data/$NAME out=${OUT:-runs/$NAME${QUICK:+-quick}${MODEL:+-${MODEL//\//_}}${PROCESS:+-$PROCESS}}
budgets=()                                                            # what pruning keeps; digits: as much as D2C, so that one random row serves both
for k in $KEEP; do budgets+=("--keep $k"); done
[ -n "$KEEP" ] || budgets=("--per-class $PER_CLASS")
wants() { case " $RUNS " in *" $1 "*) return 0 ;; esac; return 1; }
child=
run() { "$@" & child=$!; wait "$child"; child=; }                     # in the background: so a signal to this script reaches the stage, which saves and ends
end() { trap - TERM INT; if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null || true; wait "$child" || true; fi; exit "$1"; }
trap 'end 143' TERM
trap 'end 130' INT
stage() { [ -n "$dry" ] || { echo "--- $*"; run "$py" "$@"; }; }
heavy() {                                                            # the stages that torchrun spreads over NPROC processes
    if [ -n "$dry" ] || [ "$NPROC" -eq 1 ]; then stage "$@"; return; fi
    echo "--- $*"; run "$py" -m torch.distributed.run --standalone --nproc_per_node "$NPROC" -- "$@"
}
train_sample() {                                                     # train_sample RUN [flags of train.py]: train, then draw from its EMA
    local run=$1; shift
    if [ -n "$dry" ]; then planned+=("$run"); return; fi
    heavy train.py --data "$data" ${preset[@]+"${preset[@]}"} --steps "$STEPS" --seed "$seed" --device "$DEVICE" ${MODEL:+--model "$MODEL"} ${PROCESS:+--process "$PROCESS"} $TRAIN "$@" --out "$run"
    local again=; if [ -e "$run/samples.npy" ] && [ "$run/last.pt" -nt "$run/samples.npy" ]; then again=--overwrite; fi
    heavy sample.py --checkpoint "$run/last.pt" --num "$NUM_SAMPLES" $SAMPLER --seed "$seed" --device "$DEVICE" --out "$run" $again
    measured+=("$run")
    if [ -n "${QUICK:-}" ] && [ ${#measured[@]} -lt ${#planned[@]} ] && [ ! "$run/metrics.json" -nt "$run/samples.npy" ]; then
        judge >/dev/null; echo "report so far: $out/report/report.md"
    fi
}
judge() {                                                            # measure and compare the runs that there are; what has been measured is skipped
    local judge=(--data "$data" --device "$DEVICE" --runs "${measured[@]}") interval=                   # none of the judges selected or was aligned to
    [ -z "${JUDGE_WEIGHTS:-}" ] || judge+=(--encoder-weights "$JUDGE_WEIGHTS")
    [ -z "${REFERENCE:-}" ] || judge+=(--reference-stats "$REFERENCE")
    [ "$REPORT" != full ] || interval="--bootstrap 20"
    heavy evaluate.py "${judge[@]}" --encoder $JUDGE $interval          # the first encoder is the table's
    compare_runs
    if [ -n "$TRAJECTORY" ] && [ ${#measured[@]} -eq ${#planned[@]} ]; then                             # last: it takes longest
        local run num=()
        for run in "${measured[@]}"; do
            if ! ls "$run"/step_*.pt >/dev/null 2>&1; then echo "no trajectory: $run has no step_*.pt (TRAIN=\"--checkpoint-every N\")"; return; fi
        done
        [ "$TRAJECTORY" = all ] || [ "$TRAJECTORY" -ge "$NUM_SAMPLES" ] || num=(--trajectory-num "$TRAJECTORY")
        heavy evaluate.py "${judge[@]}" --encoder ${JUDGE%% *} --trajectory ${num[@]+"${num[@]}"}
        compare_runs
    fi
}
compare_runs() {
    local beside=() other
    for other in runs/*/report/report.json; do                           # sound reports of other data sets and networks
        [ ! -e "$other" ] || [ "$other" -ef "$out/report/report.json" ] || ! "$py" -c "import json, sys; json.load(open(sys.argv[1]))['setting']" "$other" 2>/dev/null || beside+=("$other")
    done
    stage report.py "${measured[@]}" --encoder "${JUDGE%% *}" ${beside[@]+--beside "${beside[@]}"} --out "$out/report"
}
announce() {                                                         # what will be done; and, once the first steps have shown the pace, for how long
    [ ${#planned[@]} -gt 0 ] || refuse "RUNS=\"$RUNS\" asks for no training"
    echo "${#planned[@]} trainings of $STEPS steps, $NUM_SAMPLES samples each, judged by $JUDGE; in this order: ${planned[*]##*/}"
    "$py" - "$STEPS" "$out" "${planned[@]##*/}" <<'EOF' &
import json, os, pathlib, shutil, sys, time
steps, out, parent = int(sys.argv[1]), pathlib.Path(sys.argv[2]), os.getppid()
files = [out / run / "stats.jsonl" for run in sys.argv[3:]]
last = lambda f: next((json.loads(x) for x in reversed(f.read_text().splitlines()) if x.endswith("}")), None) if f.exists() else None
while not (pace := [r["seconds"] / r["step"] for f in files if (r := last(f))]):
    time.sleep(1)
    if os.getppid() != parent:                                        # run_all.sh has ended
        sys.exit()
if left := sum(steps - min(steps, r["step"] if (r := last(f)) else 0) for f in files):
    print(f"\nall trainings together: about {pace[-1] * left / 60:,.0f} more minutes at the pace of the first steps, sampling and judging not counted; "
          f"{shutil.disk_usage(out).free / 1e9:,.0f} GB of disk are free", flush=True)
EOF
}

# ------------------------------------------------------------------ one output folder, one set of sizes
mkdir -p "$out"
sizes=
for pair in STEPS:train TRAIN:train NUM_SAMPLES:sample SAMPLER:sample; do  # another size would leave half of the runs at the old one
    size=${pair%:*} made=("$out"/*/"${pair#*:}.args.json")
    now=$size=${!size} old=$(grep "^$size=" "$out/sizes.txt" 2>/dev/null || true)
    [ "${old:-$now}" = "$now" ] || [ ! -e "${made[0]}" ] || refuse "$out was made with $old, now $now; use OUT=another folder, or remove $out"
    sizes+=$now$'\n'
done
printf %s "$sizes" >"$out/sizes.txt"
measured=() planned=() dry=

# ------------------------------------------------------------------ ImageNet 256 as the D2C paper has it (Huang et al. 2025, section 4; methods of scoring and attaching: README)
# Disk: latents 21 GB, about 36 GB a run (last.pt 11, four EMAs 11, visual tokens 4, samples 10). GPU time, the paper's: scoring 2.1 h, training 7.4 h a run. Choices: SCORER (DiT-XL-2-256x256.pt of the DiT repository),
# OFFICIAL (dit, sit, or empty for a checkpoint of train.py), VAE, REFERENCE (ADM's VIRTUAL_imagenet256_labeled.npz), IMAGE_SIZE, VISUAL_WEIGHTS, JUDGE_WEIGHTS.
imagenet() {
    : "${VAE:=stabilityai/sd-vae-ft-ema}" "${OFFICIAL=dit}" "${IMAGE_SIZE:=256}"
    heavy data.py "$images" --size "$IMAGE_SIZE" --vae "$VAE" --latents-only --batch-size $((64 * NPROC)) --device "$DEVICE" --out "$data"
    for seed in $SEEDS; do
        tail=; [ "$seed" = "${SEEDS%% *}" ] || tail=-seed$seed
        heavy attach.py --data "$data" --reference "$SCORER" ${OFFICIAL:+--official "$OFFICIAL"} --per-class "$PER_CLASS" --interval "$INTERVAL" --text none --visual none --judge none \
            --seed "$seed" --device "$DEVICE" --out "$out/select$tail"
        stage prune.py --data "$data" --score random --per-class "$PER_CLASS" --seed "$seed" --out "$out/random$tail/prune"
        for how in random d2c-select; do                             # the 2 x 2: chosen at random or by difficulty, without and with attachments
            keep=$out/select$tail/keep.npy; [ $how = d2c-select ] || keep=$out/random$tail/prune/keep.npy
            if wants $how; then train_sample "$out/$how$tail" --indices "$keep"; fi
            wants $how-attach || continue
            stage data.py "$images" --size "$IMAGE_SIZE" --indices "$keep" --out "$out/$how-attach$tail/images"  # the pixels that the visual encoder reads
            heavy attach.py --data "$data" --indices "$keep" --images "$out/$how-attach$tail/images" --text "$TEXT" --visual "$VISUAL" ${VISUAL_WEIGHTS:+--visual-weights "$VISUAL_WEIGHTS"} --judge none \
                --seed "$seed" --device "$DEVICE" --out "$out/$how-attach$tail/attach"
            train_sample "$out/$how-attach$tail" --attach "$out/$how-attach$tail/attach"
        done
    done
}

# ------------------------------------------------------------------ the runs: each comparison changes one thing
compare() {
    for seed in $SEEDS; do
        tail=; [ "$seed" = "${SEEDS%% *}" ] || tail=-seed$seed
        full=$out/full$tail reference=$out/full$tail/last.pt             # always: it is the reference of all that follows
        surrogate=(--surrogate "${SURROGATE:-ddae}" ${SURROGATE_WEIGHTS:+--weights "$SURROGATE_WEIGHTS"})
        [ "${SURROGATE:-ddae}" != ddae ] || [ -n "${SURROGATE_WEIGHTS:-}" ] || surrogate+=(--weights "$reference")
        train_sample "$full"
        for b in "${budgets[@]}"; do                                     # pruning: every budget has its own random row
            size=; [ "$b" = "${budgets[0]}" ] || size=-${b##* }
            if wants random || { [ -z "$KEEP" ] && { wants random-attach || wants d2c-select || wants d2c-select-attach; }; }; then
                stage prune.py --data "$data" --score random $b --seed "$seed" --out "$out/random$size$tail/prune"
                train_sample "$out/random$size$tail" --indices "$out/random$size$tail/prune/keep.npy"
            fi
            if wants pruned || wants pruned-dro || wants pruned-dro-resample; then
                heavy prune.py --data "$data" "${surrogate[@]}" \
                    --score "${SCORE%% *}" $b --seed "$seed" --device "$DEVICE" --out "$out/pruned$size$tail/prune"
                keep=$out/pruned$size$tail/prune/keep.npy
            fi
            if wants pruned; then
                train_sample "$out/pruned$size$tail" --indices "$keep"
                for other in ${SCORE#"${SCORE%% *}"}; do                 # other scores, of the same features where they look at features
                    run=$out/pruned-$other$size$tail features=$out/pruned$size$tail/prune/features.npy from=()
                    case $other in random|el2n|ccs) ;; *) if [ -e "$features" ]; then from=(--features "$features"); else from=("${surrogate[@]}"); fi ;; esac
                    heavy prune.py --data "$data" ${from[@]+"${from[@]}"} --score "$other" $b --seed "$seed" --device "$DEVICE" --out "$run/prune"
                    train_sample "$run" --indices "$run/prune/keep.npy"
                done
            fi
            if wants pruned-dro || wants pruned-dro-resample; then
                heavy reweight.py --data "$data" --indices "$keep" --reference "$reference" $DRO --seed "$seed" --device "$DEVICE" --out "$out/pruned-dro$size$tail/reweight"
                dro=(--indices "$keep" --weights "$out/pruned-dro$size$tail/reweight/weights.npy")
                if wants pruned-dro; then train_sample "$out/pruned-dro$size$tail" "${dro[@]}"; fi
                if wants pruned-dro-resample; then train_sample "$out/pruned-dro-resample$size$tail" "${dro[@]}" --reweight-mode resample; fi
            fi
        done
        d2c_random=$out/random$tail/prune/keep.npy                       # D2C: the 2 x 2 of selection and attachment at PER_CLASS images
        if [ -n "$KEEP" ] && { wants random-attach || wants d2c-select || wants d2c-select-attach; }; then
            stage prune.py --data "$data" --score random --per-class "$PER_CLASS" --seed "$seed" --out "$out/d2c-random$tail/prune"
            d2c_random=$out/d2c-random$tail/prune/keep.npy
            train_sample "$out/d2c-random$tail" --indices "$d2c_random"
        fi
        attach=(--data "$data" --reference "$reference" --text "$TEXT" --visual "$VISUAL" --seed "$seed" --device "$DEVICE" ${one_class[@]+"${one_class[@]}"})
        [ "$NAME" = digits ] || [ "$VISUAL" = none ] || attach+=(--flips)  # both orientations, so that the attached runs may mirror as the others do
        if wants random-attach; then
            heavy attach.py "${attach[@]}" --indices "$d2c_random" --out "$out/random-attach$tail/attach"
            train_sample "$out/random-attach$tail" --attach "$out/random-attach$tail/attach"
        fi
        if wants d2c-select || wants d2c-select-attach; then
            heavy attach.py "${attach[@]}" --per-class "$PER_CLASS" --interval "$INTERVAL" --out "$out/d2c-select-attach$tail/attach"
        fi
        if wants d2c-select; then train_sample "$out/d2c-select$tail" --indices "$out/d2c-select-attach$tail/attach/keep.npy"; fi
        if wants d2c-select-attach; then train_sample "$out/d2c-select-attach$tail" --attach "$out/d2c-select-attach$tail/attach"; fi
    done
}
if [ "$what" = imagenet ]; then
    todo=imagenet
else
    todo=compare
    stage data.py "${source[@]}" --out "$data"
    if [ "$(wc -l <"$data/classes.txt")" -eq 1 ]; then                   # one class: nothing to weigh, and no classifier to train
        RUNS=$(tr ' ' '\n' <<<"$RUNS" | sed '/^pruned-dro/d') JUDGE=$(tr ' ' '\n' <<<"$JUDGE" | sed '/^scratch$/d') one_class=(--judge pixels)
        RUNS=$(echo $RUNS) JUDGE=$(echo ${JUDGE:-pixels})
    fi
fi
dry=1; $todo; dry=                                                    # once without doing anything, to know what is planned
announce
$todo
judge
