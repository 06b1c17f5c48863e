"""How each kernel is launched: heuristics, and the tuned tables that override them (<gpu>.json)."""
