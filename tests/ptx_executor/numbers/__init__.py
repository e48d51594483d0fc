"""Arithmetic of registers: arrays with one element for every thread, stored as raw bits."""
