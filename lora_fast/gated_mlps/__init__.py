"""Gated MLPs, y = down(act(gate(x)) ⊙ up(x)), found by what their forward does.

No model is known by name. :mod:`discovery` runs the forward of a module on symbols, and
:mod:`closed_code` makes sure that it cannot do anything that symbols do not show. :mod:`switch`
gives the modules of a model a class that computes them as one operation.
"""
