"""Which of several ways computes an operation fastest: by a model, or by timing them once.

A :class:`~.plans.Query` says what is computed, :func:`~.plans.candidates` in which ways it can be,
:mod:`~.cost_model` how long each should take. :class:`~.tuner.Tuner` picks one, and never changes
its mind about a query while the process lives; :mod:`~.cache` keeps what was timed on disk.
"""
