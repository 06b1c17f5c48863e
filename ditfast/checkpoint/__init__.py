"""Checkpoints: the formats of the field, read safely, told apart, written whole."""
