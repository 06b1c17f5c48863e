"""Checkpoints: loads and saves the common formats safely."""
