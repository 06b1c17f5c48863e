"""What is measured and who runs it: cases, their random weights and inputs, the providers."""
