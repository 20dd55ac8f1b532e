"""The paper's ablations: rows, runs and tables."""
