"""The records of measurements: rows, derived columns, result files and their comparison."""
