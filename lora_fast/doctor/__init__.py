"""Diagnosis of this machine: what works, and why the rest does not."""
