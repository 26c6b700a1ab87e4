"""A thin trainer (GRPO, PPO, DAPO): config, data, rewards, losses, checkpoints.

`spec_rollout.train.trainer.run(config)` trains, `resume(run_dir)` continues. Nothing heavy is
imported here.
"""
