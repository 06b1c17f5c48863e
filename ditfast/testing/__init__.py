"""Every operator once, as data: formula, random inputs, FLOPs and bytes; random weights of models."""
