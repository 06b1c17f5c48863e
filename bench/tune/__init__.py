"""``ditfast tune``: candidate launch configurations, measured and judged, and the table of the best."""
