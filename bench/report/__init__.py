"""``ditfast bench report``: result files as a page, plots, and tables for READMEs."""
