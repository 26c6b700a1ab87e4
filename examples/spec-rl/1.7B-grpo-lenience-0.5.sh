#!/usr/bin/env bash
# SPEC-RL as published for GRPO: the run of examples/vanilla-grpo/1.7B-grpo.sh with the rule lenient, e^0.5.
#
#     MODEL_PATH=models/Qwen3-1.7B-Base DATA_PATH=data/train.jsonl examples/spec-rl/1.7B-grpo-lenience-0.5.sh [--set KEY=VALUE ...]
#
# Lossless instead: --set rollout.rule=coupled --set rollout.log_lenience=none --set rollout.drafting=true
# Not run on a GPU yet; see examples/one_gpu.toml.
set -euo pipefail
examples=$(cd "$(dirname "$0")/.." && pwd)
# -P: not the package of a checkout that is the current folder, which may have no extension.
exec "${PYTHON:-python}" -P -m spec_rollout.cli train "$examples/one_gpu.toml" \
  --set model.path="${MODEL_PATH:-models/Qwen3-1.7B-Base}" \
  --set data.path="${DATA_PATH:-data/train.jsonl}" \
  --set log.run_dir="${SAVE_PATH:-runs/1.7B-grpo-lenience-0.5}" \
  --set rollout.rule=lenient --set rollout.log_lenience=0.5 \
  "$@"
