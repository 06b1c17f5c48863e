"""The command lines of the suites, and their tables. What is heavy is imported when a command runs."""
