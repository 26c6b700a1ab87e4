"""Files of benchmarks/results as Markdown tables: a module per subject."""
