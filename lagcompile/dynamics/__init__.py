"""Dynamical models as modules: rollouts, integrators, measured trajectories and their stage-wise linearisation."""
