#!/usr/bin/env bash
# sbatch --nodes 2 --gpus-per-node 8 launch/slurm.sh run.yaml [key=value ...]      (not run on a GPU)
#
# Result: one launcher per machine, each with one process per GPU; the log of rank 0 in scalemlo-JOBID.out.
# Submit from the repository root, with the environment that has scalemlo in .venv or in VENV.
#SBATCH --job-name=scalemlo
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --output=%x-%j.out
set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "usage: sbatch [options] launch/slurm.sh RUN.yaml [key=value ...]" >&2
    exit 2
fi

NODES=${SLURM_NNODES:-1}
GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
FIRST_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Two jobs that share a machine get two ports.
PORT=$((29500 + SLURM_JOB_ID % 1000))

THREADS=$((${SLURM_CPUS_ON_NODE:-$GPUS_PER_NODE} / GPUS_PER_NODE))

export VENV=${VENV:-.venv} NODES GPUS_PER_NODE FIRST_NODE PORT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((THREADS > 0 ? THREADS : 1))}

# SLURM_NODEID is known only inside srun, hence the quotes.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
    if [[ $NODES -gt 1 ]]; then config=launch/multi_node.yaml; else config=launch/gpu_8.yaml; fi
    exec "$VENV/bin/accelerate" launch --config_file "$config" \
        --num_machines "$NODES" --num_processes "$((NODES * GPUS_PER_NODE))" \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$FIRST_NODE" --main_process_port "$PORT" \
        -m scalemlo train "$@"
' launcher "$@"
