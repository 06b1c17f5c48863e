"""The suites: what each one measures, row by row."""
