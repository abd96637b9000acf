"""Dynamical models as modules: rollouts, integrators, measured trajectories and their stage-wise linearisation."""

from lagcompile.dynamics.integrators import RK4, Adaptive, Euler, ImplicitMidpoint, OdeCell
from lagcompile.dynamics.rollout import RecurrentCell, Rollout, Select
from lagcompile.dynamics.trajectories import Trajectories, Trajectory, read_csv

__all__ = [
    "RK4",
    "Adaptive",
    "Euler",
    "ImplicitMidpoint",
    "OdeCell",
    "RecurrentCell",
    "Rollout",
    "Select",
    "Trajectories",
    "Trajectory",
    "read_csv",
]
