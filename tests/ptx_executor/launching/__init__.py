"""In the place of a CUDA driver: what Triton asks of one, and how a launch gets its arguments."""
