#!/usr/bin/env bash
# Train the blocks of a model in jobs that know nothing of one another, one block a job, and merge what they saved.
#
#   recipes/jobs.sh all B OUT_DIR TASK [OPTION...]      on this machine: all B jobs, then the merge
#   recipes/jobs.sh block K B OUT_DIR TASK [OPTION...]  the job of block K alone, of 0..B-1, wherever it runs
#   recipes/jobs.sh merge B OUT_DIR                     what they saved becomes OUT_DIR/whole
#
# TASK and OPTION are those of `diffusionblocks train`, which has to be in PATH:
#
#   recipes/jobs.sh all 3 outputs/jobs masked-lm --config recipes/configs/gutenberg_masked.yaml \
#       --train_file train.parquet --validation_file validation.parquet
#
# Added to them are `--train_blocks K --shared per_block`: no job needs another's weights. So it is for blocks that start from
# their own input: of masked text, of images by diffusion, and of the paper (`--preset paper`) in other tasks.
#
# `all` runs as many jobs at a time as there are GPUs, each on its own (JOBS=2 says otherwise; without a GPU it is one), and
# they write OUT_DIR/block-K/log.txt. If one fails, the others go on, nothing is merged, and it says which and ends with
# status 1. The same command again goes on: jobs that are done are left alone, others resume from their last checkpoint.
# On a cluster: recipes/jobs_slurm.sh.
set -euo pipefail

fail() {
    echo "jobs.sh: error: $*" >&2
    exit 1
}

# One block's job: `train_block K B OUT_DIR TASK [OPTION...]`. What the options say of what is added gives way.
train_block() {
    local k=$1 blocks=$2 job=$3/block-$1 asked resume=()
    shift 3
    ((k >= 0 && k < blocks)) || fail "block $k must be one of 0..$((blocks - 1))"
    mkdir -p "$job"
    asked=$(printf '%q ' "$blocks" "$@")
    if compgen -G "$job/checkpoint-*" >/dev/null; then
        resume=(--resume_from_checkpoint last)
    fi
    # (A job that has no checkpoint has trained nothing: its options may have been the mistake.)
    if [[ -e $job/command && (-e $job/done || ${resume[*]}) && $(<"$job/command") != "$asked" ]]; then
        fail "$job was trained by other options: $(<"$job/command"). Choose another OUT_DIR"
    fi
    echo "$asked" >"$job/command"
    if [[ -e $job/done ]]; then
        echo "block $k is done"
        return
    fi
    diffusionblocks train --num_processes 1 "$@" --num_blocks "$blocks" --train_blocks "$k" \
        --shared per_block --output_dir "$job" "${resume[@]}" || exit # it has said why
    touch "$job/done"
}

# `merge_blocks B OUT_DIR`
merge_blocks() {
    local k missing=() folders=()
    for ((k = 0; k < $1; k++)); do
        folders+=("$2/block-$k")
        [[ -e $2/block-$k/done ]] || missing+=("$k")
    done
    if ((${#missing[@]})); then
        fail "of the $1 blocks in $2 these are not done: ${missing[*]}. Nothing is merged; start them again, and they go on"
    fi
    diffusionblocks merge --overwrite "$2/whole" "${folders[@]}"
}

# What one GPU trains, block after block: `train_every N FIRST B OUT_DIR TASK [OPTION...]`
train_every() {
    local step=$1 k=$2 blocks=$3 out=$4
    shift 4
    for (( ; k < blocks; k += step)); do
        mkdir -p "$out/block-$k"
        # (`merge_blocks` sees which are not done.)
        (train_block "$k" "$blocks" "$out" "$@") >>"$out/block-$k/log.txt" 2>&1 || true
    done
}

# `train_all B OUT_DIR TASK [OPTION...]`
train_all() {
    local blocks=$1 out=$2 found gpus lane lanes k
    found=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, || true)
    IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES-$found}"
    lanes=${JOBS:-$((${#gpus[@]} ? ${#gpus[@]} : 1))}
    set -m # each lane is a process group of its own, to be stopped whole
    trap 'for lane in $(jobs -p); do kill -- "-$lane"; done' INT TERM
    for ((lane = 0; lane < lanes && lane < blocks; lane++)); do
        if ((${#gpus[@]})); then export CUDA_VISIBLE_DEVICES=${gpus[lane % ${#gpus[@]}]}; fi
        train_every "$lanes" "$lane" "$@" &
    done
    wait
    for ((k = 0; k < blocks; k++)); do
        [[ -e $out/block-$k/done ]] || echo "block $k: $(tail -n 1 "$out/block-$k/log.txt") ($out/block-$k/log.txt)" >&2
    done
}

case ${1-} in
    all)
        (($# >= 4)) || fail "usage: jobs.sh all B OUT_DIR TASK [OPTION...]"
        train_all "${@:2}"
        merge_blocks "$2" "$3"
        ;;
    block)
        (($# >= 5)) || fail "usage: jobs.sh block K B OUT_DIR TASK [OPTION...]"
        train_block "${@:2}"
        ;;
    merge)
        (($# == 3)) || fail "usage: jobs.sh merge B OUT_DIR"
        merge_blocks "$2" "$3"
        ;;
    *) fail "usage: jobs.sh all|block|merge ...; the first lines of $0 explain" ;;
esac
