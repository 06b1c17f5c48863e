"""``ditfast warm``: kernels compiled ahead, and a Triton cache that is carried to another machine."""
