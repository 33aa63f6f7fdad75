#!/usr/bin/env bash
# seeds.sh SEED...: the demonstration with each seed, and beside it the connector alone (no new experts)
# for as many steps; the result is a table of mean and spread. Finished runs are not redone.
set -euo pipefail
ranks=${RANKS:-2}
mkdir -p runs/seeds
runs=()
train() { # name, override...
    local name=$1
    shift
    moe-ext launch launcher.ranks_per_node="$ranks" parallel.ep_size="$ranks" experiment=demo \
        name="$name" run_dir="runs/seeds/$name" "$@"
    runs+=("runs/seeds/$name")
}
for seed in "$@"; do
    train "demo-$seed" seed="$seed"
    train "connector-$seed" seed="$seed" 'chain=[align]' stages.align.steps=260
done
moe-ext compare "${runs[@]}" | tee runs/seeds/table.md
