"""What every command loads: data, the policy, the engine that a config names."""
