"""The tests, in the rooms of what they test. A package, since others install one of this name."""
