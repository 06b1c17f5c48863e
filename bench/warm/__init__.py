"""``ditfast warm``: kernels compiled ahead, and a Triton cache as a thing to carry."""
