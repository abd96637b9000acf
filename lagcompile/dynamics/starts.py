"""Where a fit starts: stage length, first states, scales and random parameter guesses.

In: `CellFunctions` and `Trajectories`. Out: plain tensors. Invariant: nothing here looks at the true parameters or at
how a run ends; every rule depends on data and on the present guess alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lagcompile.dynamics.functional import CellFunctions
from lagcompile.dynamics.rollout import Rollout, Select
from lagcompile.dynamics.stages import Stages
from lagcompile.dynamics.trajectories import Trajectories, Trajectory
from lagcompile.ir.base import BindError


def observation_map(rollout: Rollout, data: Trajectories, observed: Sequence[int] | None = None) -> tuple[int, ...]:
    """State component that each output measures directly, -1 where an output measures none.

    Args:
        rollout: the model; a `Select` readout or no readout tells the map.
        data: the measurements.
        observed: the user's own map, one entry for each output.

    Raises:
        BindError: the map does not have one entry for each output, or names a component that is not there.
    """
    if observed is None:
        if isinstance(rollout.readout, Select):
            observed = rollout.readout.components
        elif isinstance(rollout.readout, nn.Identity):
            observed = tuple(range(rollout.state_size))
        else:
            observed = (-1,) * data.outputs
    found = tuple(int(c) for c in observed)
    if len(found) != data.outputs:
        raise BindError(
            f"the data have {data.outputs} outputs, but the model observes {len(found)} components {found}: pass "
            "readout=[indices of the observed components] or observed=[component of each output, -1 for none]"
        )
    if any(not -1 <= c < rollout.state_size for c in found):
        raise BindError(f"observed components {found} are outside the state of size {rollout.state_size}")
    return found


def filled(data: Trajectories) -> Tensor:
    """Observations (trajectories, N, outputs), missing ones interpolated in time, held at the ends, 0 if all are."""
    if bool(data.mask.all()):
        return data.observations
    result = data.observations.clone()
    samples = torch.arange(data.samples, device=result.device)
    for i in range(len(data)):
        for c in range(data.outputs):
            known = data.mask[i, :, c].nonzero()[:, 0]
            if len(known) == 0:
                continue
            right = torch.searchsorted(known, samples).clamp(max=len(known) - 1)
            left = (right - 1).clamp_min(0)
            a, b = known[left], known[right]
            values, times = data.observations[i, :, c], data.times[i]
            width = (times[b] - times[a]).clamp_min(1e-300)
            part = ((times - times[a]) / width).clamp(0.0, 1.0)
            result[i, :, c] = torch.where(b > a, values[a] + part * (values[b] - values[a]), values[b])
    return result


def states_from_observations(data: Trajectories, observed: Sequence[int], size: int) -> Tensor:
    """States (trajectories, N, size) whose observed components are the measurements; the others are 0."""
    values = filled(data)
    states = values.new_zeros(len(data), data.samples, size)
    for output, component in enumerate(observed):
        if component >= 0:
            states[..., component] = values[..., output]
    return states


def states_from_simulation(functions: CellFunctions, data: Trajectories, theta: Tensor, x0: Tensor) -> Tensor:
    """States (starts, trajectories, N, n) of the simulation from x0 (trajectories, n).

    A simulation that explodes is held at its last finite state, so that the states remain a usable start.
    """
    whole = Stages(functions, data, 1, torch.ones(data.outputs, dtype=functions.dtype, device=functions.device))
    x = x0.expand(theta.shape[0], -1, -1)
    path = [x]
    for t in range(data.samples - 1):
        inputs = None if whole.inputs is None else whole.inputs[:, t, 0]
        following = functions.step(theta, x, inputs, whole.uniform or whole.lengths[:, t, 0])
        sound = torch.isfinite(following).all(-1, keepdim=True) & (following.abs() < 1e8).all(-1, keepdim=True)
        x = torch.where(sound, following, x)
        path.append(x)
    return torch.stack(path, dim=2)


def state_scale(states: Tensor, data: Trajectories) -> Tensor:
    """Unit of each state component (n,): its deviation over the data, or the mean unit where it does not vary."""
    lengths = torch.tensor(data.lengths, device=states.device)
    inside = torch.arange(data.samples, device=states.device) < lengths[:, None]
    rows = states.reshape(-1, *states.shape[-3:])[:, inside]
    deviation = rows.std(dim=1).median(dim=0).values if rows.shape[1] > 1 else rows.abs().mean((0, 1))
    deviation = torch.where(torch.isfinite(deviation), deviation, torch.zeros_like(deviation))
    alive = deviation > 1e-12
    unit = deviation[alive].log().mean().exp() if bool(alive.any()) else deviation.new_ones(())
    return torch.where(alive, deviation, unit)


def parameter_scale(functions: CellFunctions, theta: Tensor) -> Tensor:
    """Unit of each parameter (starts, p): the root mean square of its tensor, 1 where that is 0."""
    parts = []
    for part in theta.split(functions.layout.sizes, dim=1):
        size = part.square().mean(1, keepdim=True).sqrt().expand_as(part)
        parts.append(torch.where(size > 1e-8, size, torch.ones_like(size)))
    return torch.cat(parts, dim=1)


def random_starts(theta: Tensor, count: int, *, factor: float = 5.0, seed: int = 0) -> Tensor:
    """Guesses (count, p) spread log-uniformly within a factor around theta (p,), signs kept."""
    generator = torch.Generator().manual_seed(seed)
    spread = (2.0 * torch.rand(count, theta.shape[0], generator=generator, dtype=torch.float64) - 1.0) * math.log(
        factor
    )
    return theta * spread.exp().to(theta)


def growth(
    functions: CellFunctions, data: Trajectories, theta: Tensor, states: Tensor, *, longest: int
) -> dict[int, Tensor]:
    """Largest norm of the product of S step Jacobians along given states, for S = 1, 2, 4, ...

    Args:
        functions: the rollout.
        data: the measurements.
        theta: (starts, p) guesses.
        states: (starts or 1, trajectories, N, n) states along which to linearise, in natural units.
        longest: largest S.

    Returns:
        S -> (starts,) largest row sum norm over trajectories and windows, states in units of their scale.
    """
    scale = state_scale(states, data)
    steps = Stages(functions, data, 1, torch.ones(data.outputs, dtype=functions.dtype, device=functions.device))
    path = states.expand(theta.shape[0], -1, -1, -1)
    product = functions.state_jacobian(theta, path.flatten(1, 2), *steps.lane_data(None))
    product = (product * (scale / scale[:, None])).unflatten(1, path.shape[1:3])
    inside = steps.defect_on
    found, length = {}, 1
    while True:
        # a window that leaves its trajectory says nothing
        norms = product.abs().nan_to_num(1e150, 1e150).clamp_max(1e150).sum(-1).amax(-1)
        found[length] = torch.where(inside, norms, torch.zeros_like(norms)).flatten(1).amax(1)
        if 2 * length > min(longest, data.samples - 1) or not bool(torch.isfinite(product).all()):
            return found
        even = product.shape[2] // 2 * 2
        product = product[:, :, 1:even:2] @ product[:, :, 0:even:2]
        inside = inside[:, 0:even:2] & inside[:, 1:even:2]
        length *= 2


def conditioned_length(norms: dict[int, Tensor], bound: float) -> int:
    """Longest stage whose Jacobian products stay under a bound for the median start; 1 if none does."""
    best = 1
    for length, norm in sorted(norms.items()):
        if not bool(norm.median() <= bound):
            break
        best = length
    return best


def windows(data: Trajectories, *, count: int = 8, length: int = 33) -> Trajectories:
    """Short pieces of the data, evenly spread over all samples, as separate trajectories."""
    if data.samples <= count * length and len(data) == 1:
        return data
    places: list[tuple[int, int, int]] = []
    for i, samples in enumerate(data.lengths):
        share = max(1, round(count * samples / sum(data.lengths)))
        size = min(length, samples)
        starts = torch.linspace(0, samples - size, share).long().tolist()
        places.extend((i, s, size) for s in starts)
    return Trajectories.stack(
        [
            Trajectory(
                data.observations[i, s : s + n],
                data.times[i, s : s + n],
                None if data.inputs is None else data.inputs[i, s : s + n],
                data.mask[i, s : s + n],
                name=f"{data.names[i]}[{s}:{s + n}]",
            )
            for i, s, n in places
        ],
        dtype=data.observations.dtype,
    ).to(device=data.observations.device)
