#!/usr/bin/env bash
# GRPO of a 1.7B model on one GPU, without reuse: what examples/spec-rl/1.7B-grpo-lenience-0.5.sh is compared with.
#
#     MODEL_PATH=models/Qwen3-1.7B-Base DATA_PATH=data/train.jsonl examples/vanilla-grpo/1.7B-grpo.sh [--set KEY=VALUE ...]
#
# Not run on a GPU yet; see examples/one_gpu.toml.
set -euo pipefail
examples=$(cd "$(dirname "$0")/.." && pwd)
# -P: not the package of a checkout that is the current folder, which may have no extension.
exec "${PYTHON:-python}" -P -m spec_rollout.cli train "$examples/one_gpu.toml" \
  --set model.path="${MODEL_PATH:-models/Qwen3-1.7B-Base}" \
  --set data.path="${DATA_PATH:-data/train.jsonl}" \
  --set log.run_dir="${SAVE_PATH:-runs/1.7B-grpo}" \
  --set rollout.rule=none \
  "$@"
