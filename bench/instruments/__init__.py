"""What benchmarks and tests both measure with."""
