"""Choosing the fastest way to compute an operation, by a cost model or by timing candidates once.

A :class:`~.plans.Query` describes the operation, :func:`~.plans.candidates` lists the plans for it,
:mod:`~.cost_model` estimates their times. :class:`~.tuner.Tuner` picks one, which stays fixed for
the life of the process; :mod:`~.cache` stores timings on disk.
"""
