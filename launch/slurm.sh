#!/usr/bin/env bash
# sbatch --nodes 2 --gpus-per-node 8 launch/slurm.sh run.yaml [key=value ...]      (not run on GPUs, nor under SLURM)
#
# Result: one launcher per machine, each with one process per GPU; the log of all ranks in scalemlo-JOBID.out.
# LAUNCH names the configuration in launch/ and so the engine: LAUNCH=zero3 sbatch ...; ddp, if it is not set.
# Submit from the repository root, with the environment that has scalemlo in .venv or in VENV.
#SBATCH --job-name=scalemlo
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --output=%x-%j.out
set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "usage: [LAUNCH=NAME] sbatch [options] launch/slurm.sh RUN.yaml [key=value ...]" >&2
    exit 2
fi

export CONFIG=launch/${LAUNCH:-ddp}.yaml
if [[ ! -f $CONFIG ]]; then
    echo "launch/slurm.sh: LAUNCH=${LAUNCH:-ddp}: there is no $CONFIG" >&2
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
    exec "$VENV/bin/accelerate" launch --config_file "$CONFIG" \
        --num_machines "$NODES" --num_processes "$((NODES * GPUS_PER_NODE))" \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$FIRST_NODE" --main_process_port "$PORT" \
        -m scalemlo train "$@"
' launcher "$@"
