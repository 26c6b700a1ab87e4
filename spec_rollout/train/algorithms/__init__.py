"""Algorithms of reinforcement learning: advantages from rewards, loss from log-probs."""
