"""Judging a policy: fresh plain samples, scored. Cached rollouts play no part."""
