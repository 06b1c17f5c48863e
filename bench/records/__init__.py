"""What is kept of a measurement: rows, derived columns, result files and their comparison."""
