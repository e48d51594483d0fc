"""The layer below an adapter: what stands in the way of the kernels, its product, its merging."""
