"""A thin GRPO trainer on the embedded engine: config, data, rewards, losses, checkpoints."""
