#!/usr/bin/env bash
# GRPO with verl, in which every rollout follows what the same sample was in the last epoch.
#
#     examples/verl_grpo.sh [OVERRIDE ...]
#
# As it stands: a tiny model on the CPU, three epochs, in the environment that `make test-verl` made. It borrows model,
# data, reward and verl's platform for CPUs from tests/trainers/verl.
#
# For a 1.7B model on GPUs, in an environment with verl, vLLM 0.26 to 0.33 and this package:
# - MODEL=Qwen/Qwen3-1.7B, DATA= a Parquet file with verl's columns (data_source, prompt, reward_model, extra_info with an
#   `index` for each row), PYTHON=python;
# - take the lines of "sizes" from your own verl script, and leave "cpu" out (CPU=0);
# - write out the paths in OVERRIDE: verl runs in the folder WORK, and leaves there what it writes;
# - keep "reuse" as it is. `trainer.total_epochs` has to be 2 or more: the first epoch has nothing to follow.
set -euo pipefail
cd "$(dirname "$0")/.."
CPU=${CPU:-1}
PYTHON=${PYTHON:-.venv-verl/bin/python}
WORK=$(realpath -m "${WORK:-runs/verl_grpo}")
MODEL=${MODEL:-$WORK/model}
DATA=${DATA:-$WORK/train.parquet}
# verl does not run in the checkout: Ray's workers import from the current folder first, and the package there may have
# no extension.
[ ! -e "$MODEL" ] || MODEL=$(realpath "$MODEL")
[ ! -e "$DATA" ] || DATA=$(realpath "$DATA")
[[ $PYTHON != */* ]] || PYTHON=$(realpath -s "$PYTHON")
mkdir -p "$WORK"
rollout=actor_rollout_ref.rollout
actor=actor_rollout_ref.actor

# What each sample generated stays in the vLLM that generated it. `coupled` is lossless; SPEC-RL's rule is
# '{"mode": "lenient", "log_lenience": 0.5}'.
export SPEC_ROLLOUT=${SPEC_ROLLOUT:-coupled}
# verl's default, WARN, hides the line that says what it gains.
export VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-INFO}
reuse=(
  +$rollout.agent.agent_loop_manager_class=spec_rollout.adapters.verl.ReuseManager
  # Drafts by Ray actors instead, for several replicas of the engine; with SPEC_ROLLOUT=drafting:
  # +spec_rollout.drafts=actors +spec_rollout.mode=lenient +spec_rollout.log_lenience=0.5
)

task=(
  algorithm.adv_estimator=grpo
  data.train_files="$DATA" data.val_files="$DATA"
  actor_rollout_ref.model.path="$MODEL"
  $rollout.name=vllm $rollout.n=4
  trainer.total_epochs=3 trainer.logger=[console] trainer.val_before_train=False trainer.test_freq=-1
  trainer.save_freq=-1 trainer.resume_mode=disable trainer.n_gpus_per_node=1 trainer.nnodes=1
)

sizes=(
  data.train_batch_size=8 data.max_prompt_length=32 data.max_response_length=64
  $actor.ppo_mini_batch_size=8 $actor.ppo_micro_batch_size_per_gpu=32 $actor.optim.lr=1e-5 $actor.use_kl_loss=False
  $rollout.log_prob_micro_batch_size_per_gpu=32 $rollout.tensor_model_parallel_size=1 $rollout.max_model_len=256
  $rollout.max_num_seqs=64 $rollout.gpu_memory_utilization=0.2 $rollout.agent.num_workers=1
)

cpu=()
if [ "$CPU" = 1 ]; then
  tests=$PWD/tests/trainers/verl
  export PYTHONPATH=$tests:$PWD/tests VERL_USE_EXTERNAL_MODULES=verl_cpu VERL_PLATFORM=cpu VERL_ENGINE_DEVICE=cuda
  export VLLM_CPU_KVCACHE_SPACE=1 TORCH_COMPILE_DISABLE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
  export RAY_enable_worker_prestart=0 RAY_worker_niceness=0 RAY_memory_monitor_refresh_ms=0
  "$PYTHON" - "$WORK" << 'MAKE'
import sys
from pathlib import Path

from verl_runs import make_data, make_model

folder = Path(sys.argv[1])
if not (folder / "model").exists():
    make_model(folder / "model")
make_data(folder / "train.parquet")
MAKE
  cpu=(
    data.dataloader_num_workers=0 data.filter_overlong_prompts=False
    actor_rollout_ref.model.use_remove_padding=False actor_rollout_ref.model.enable_gradient_checkpointing=False
    +actor_rollout_ref.model.override_config.attn_implementation=sdpa
    $actor.strategy=fsdp2 $actor.use_torch_compile=False $actor.fsdp_config.use_torch_compile=False
    $actor.fsdp_config.dtype=float32 "+$actor.fsdp_config.mixed_precision={param_dtype:fp32,reduce_dtype:fp32}"
    $rollout.dtype=float32 $rollout.enforce_eager=True $rollout.free_cache_engine=False $rollout.load_format=auto
    +$rollout.enable_sleep_mode=False $rollout.max_num_batched_tokens=2048
    $rollout.checkpoint_engine.update_weights_bucket_megabytes=16
    reward.custom_reward_function.path="$tests/verl_reward.py" reward.custom_reward_function.name=compute_score
    reward.num_workers=1
    trainer.device=cpu transfer_queue.backend.SimpleStorage.num_data_storage_units=1
    +ray_kwargs.ray_init.num_gpus=1 ray_kwargs.ray_init.num_cpus=16 +ray_kwargs.ray_init.include_dashboard=False
    +ray_kwargs.ray_init.object_store_memory=100000000
  )
fi

cd "$WORK"
exec "$PYTHON" -m verl.trainer.main_ppo "${task[@]}" "${sizes[@]}" "${reuse[@]}" "${cpu[@]}" \
  hydra.run.dir="$WORK/hydra" "$@"
