"""The instructions that have state.

A factory takes the emitter and an instruction and returns ``run(batch, r, q)``: the batch of CTAs,
its register file (one array for each register, one element for each thread, replaced and never
changed in place), and the mask of the threads that execute the instruction, None for all.
"""
