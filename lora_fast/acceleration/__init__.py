"""What switches a model to the kernels and says what it did; imports nothing heavy."""
