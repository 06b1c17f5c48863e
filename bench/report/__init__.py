"""``ditfast bench report``: result files as a page, plots, tables for READMEs, and a plain summary."""
