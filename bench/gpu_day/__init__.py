"""The GPU day: everything that needs a GPU, in one command that can be stopped and resumed.

    python -m bench.gpu_day              on a machine with a GPU; `make gpu` does the same in .venv
    python -m bench.gpu_day --rehearse   every step without a GPU, at tiny sizes; times nothing

steps.py      the steps, most valuable first
runner.py     runs each step in its own process, within time limits
journal.py    every event, one per line; a second call resumes from it
run_units.py  the process of a step: its units of work one after the other, each in the journal
report.py     the journal as results.json, report.md and pictures
"""
