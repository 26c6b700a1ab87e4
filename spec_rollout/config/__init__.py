"""Configuration of commands and runs: `sections` says what there is, `toml` reads and writes it."""
