#!/usr/bin/env bash
# srun ... rank.sh COMMAND...: one rank of a Slurm job. Slurm's numbers become the variables that
# torch.distributed reads; MASTER_ADDR and MASTER_PORT come from the job script.
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_SIZE=$((SLURM_NTASKS / SLURM_NNODES)) CROSS_RANK=$SLURM_NODEID CROSS_SIZE=$SLURM_NNODES
export LOCAL_WORLD_SIZE=$LOCAL_SIZE
exec "$@"
