"""The layer below an adapter: obstacles to the kernels, the equation on it, merging."""
