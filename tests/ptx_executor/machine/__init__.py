"""Threads: batches of CTAs in lock step, barriers, schedules."""
