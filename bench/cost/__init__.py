"""What a model launches, moves and computes, counted without a device, and the bounds that follow."""
