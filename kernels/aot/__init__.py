"""Compiling the kernels for GPUs that are not there: which cases, with which budgets."""
