"""``ditfast tune``: measures and judges candidate launch configurations, and writes the table of the best."""
