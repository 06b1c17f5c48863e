"""What proves the kernels: ``ditfast verify``, ``ditfast kernels``, ``ditfast rehearse``."""
