"""A campaign of measurements within a budget: its plan, its run, what it takes along, its table."""
