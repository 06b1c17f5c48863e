"""``ditfast warm``: compiles kernels ahead, and carries a Triton cache to another machine."""
