"""One module per command of `spec-rollout`; `spec_rollout.cli` dispatches."""
