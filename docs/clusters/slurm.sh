#!/bin/bash
#SBATCH --job-name=ddim
#SBATCH --array=0-7
#SBATCH --gpus=1
#SBATCH --cpus-per-task=4
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --output=ddim-%A_%a.log
#SBATCH --open-mode=append
# All parts:            sbatch slurm.sh
# Parts 5 and 7 again:  sbatch --array=5,7 slurm.sh
# Other settings:       sbatch slurm.sh -m path/to/model -c run.toml -o /data/run
set -euo pipefail
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-4}"
# The 8 of env/8 is the number of parts, and stays 8 whatever --array says. exec: the signal is for ddim.
exec ddim sample --seeds 0-999999 --format tar --set output.shard_size=1000 --quiet --shard env/8 -o pictures "$@"
