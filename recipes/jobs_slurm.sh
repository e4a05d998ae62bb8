#!/usr/bin/env bash
# A Slurm array of one-block jobs (recipes/jobs.sh): task K of the array trains block K of B.
#
#   array=$(sbatch --parsable --array=0-2 recipes/jobs_slurm.sh 3 outputs/jobs masked-lm \
#       --config recipes/configs/gutenberg_masked.yaml \
#       --train_file train.parquet --validation_file validation.parquet)
#   sbatch --dependency=afterany:$array --wrap "recipes/jobs.sh merge 3 outputs/jobs"
#
# Submit both in the folder that holds `recipes`, with `diffusionblocks` in PATH, and OUT_DIR where all machines see it. The
# second waits until all tasks have ended, and merges; if some failed, it says which and fails. Both again go on
# (`--array=2` starts block 2 alone).
#SBATCH --job-name=one-block
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --requeue
set -euo pipefail
# (Slurm runs a copy of this file: what is beside it, it finds from where it was submitted.)
exec "${SLURM_SUBMIT_DIR:-.}/recipes/jobs.sh" block "${SLURM_ARRAY_TASK_ID:?is set by sbatch --array}" "$@"
