"""Memory as kernels see it, and the checks of every access."""
