#!/usr/bin/env bash
# srun ... rank.sh COMMAND...: one rank of a Slurm job. Slurm's numbers become the variables that
# torch.distributed reads; MASTER_ADDR and MASTER_PORT come from the job script.
trap 'exit 140' USR2 # asked to stop before anything began: slurm.sbatch sees that nothing is lost
trap '' TERM         # a preemption's: Slurm sends it again, and then requeues the job itself
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_SIZE=$((SLURM_NTASKS / SLURM_NNODES)) CROSS_RANK=$SLURM_NODEID CROSS_SIZE=$SLURM_NNODES
export LOCAL_WORLD_SIZE=$LOCAL_SIZE
# Python takes seconds until it listens (training/signals.py): until then both signals wait, blocked, where
# env can do that (coreutils 8.31 or newer).
block=(env --default-signal=TERM --block-signal=TERM --block-signal=USR2)
"${block[@]}" true 2>/dev/null || block=()
exec "${block[@]}" "$@"
