"""The commands that prove the kernels: ``ditfast verify``, ``ditfast kernels``, ``ditfast rehearse``."""
