"""How many tokens are drafted: cost model, acceptance, policy, calibration and simulation.

Pure Python and NumPy: nothing in here imports vLLM or torch, so the same code decides inside the scheduler, in unit
tests and in the simulator.
"""
