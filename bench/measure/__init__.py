"""Measuring a provider: built, judged against fp64, its memory, its time beside the others'."""
