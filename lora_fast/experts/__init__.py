"""Experts of a mixture: what a call of them consists of, and what their modules look like."""
