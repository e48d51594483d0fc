"""The GPU day: everything that needs a GPU, in one command that can be stopped and started again.

    python -m bench.gpu_day              on a machine with a GPU; `make gpu` does the same in .venv
    python -m bench.gpu_day --rehearse   every step without a GPU, at tiny sizes; times nothing

steps.py      what is done, in the order of its value
runner.py     each step in a process of its own, under limits of time
journal.py    what has happened, line by line; a second call goes on from it
run_units.py  the process of a step: one unit of work after the other, each on a line of the journal
report.py     the journal as results.json, report.md and pictures
"""
