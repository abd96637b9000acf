"""The loop over time as a module: x_{t+1} = cell(x_t, u_t), y_t = readout(x_t).

In: a cell module, the number of steps and a readout. Out: `Rollout`, whose forward simulates from initial states
(single shooting). Invariant: parameters are tied over time, the cell is called on (batch, n) states, and forward is
plain PyTorch, so that autograd through it is backprop through time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lagcompile.dynamics.integrators import OdeCell
from lagcompile.ir.base import BindError


class Select(nn.Module):
    """Readout that observes some components of the state.

    Args:
        components: indices of the observed components, in the order of the outputs.
    """

    def __init__(self, components: Sequence[int]) -> None:
        super().__init__()
        self.components = tuple(components)

    def forward(self, x: Tensor) -> Tensor:
        """Observed components of (batch, n) states."""
        return x[..., list(self.components)]


class RecurrentCell(nn.Module):
    """An nn.RNNCell, nn.GRUCell or nn.LSTMCell as a cell; the pair (h, c) of an LSTM is one state [h, c].

    Args:
        cell: the recurrent cell; it keeps its parameters and its order of arguments.
    """

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    @property
    def state_size(self) -> int:
        """Numbers in one state."""
        return int(self.cell.hidden_size) * (2 if isinstance(self.cell, nn.LSTMCell) else 1)

    def forward(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        """Next state from (batch, state_size) states and (batch, input_size) inputs."""
        if u is None:
            u = x.new_zeros(x.shape[0], self.cell.input_size)
        if isinstance(self.cell, nn.LSTMCell):
            return torch.cat(self.cell(u, tuple(x.chunk(2, dim=-1))), dim=-1)
        return self.cell(u, x)


class Rollout(nn.Module):
    """A cell applied over and over.

    Args:
        cell: module with forward(x, u) or forward(x) on (batch, state_size) states, an `OdeCell`, or a recurrent
            cell of
            torch.nn, which is wrapped.
        steps: number of steps; a trajectory has steps + 1 samples.
        state_size: numbers in one state; recurrent cells know theirs.
        readout: module from states to outputs, indices of observed components, or None for the whole state.
        dt: step length of an `OdeCell` in forward where no times are given.

    Raises:
        BindError: the state size is missing, or the cell returns another shape than it was given.
    """

    def __init__(
        self,
        cell: nn.Module,
        steps: int,
        *,
        state_size: int | None = None,
        readout: nn.Module | Sequence[int] | None = None,
        dt: float = 1.0,
    ) -> None:
        super().__init__()
        if steps < 1:
            raise BindError(f"a rollout needs at least one step, got steps={steps}")
        if isinstance(cell, nn.RNNCellBase):
            cell = RecurrentCell(cell)
        if state_size is None:
            if not isinstance(cell, RecurrentCell):
                raise BindError(f"Rollout({type(cell).__name__}, ...) needs state_size, the numbers in one state")
            state_size = cell.state_size
        self.cell, self.steps, self.state_size, self.dt = cell, steps, state_size, dt
        if readout is None or isinstance(readout, nn.Module):
            self.readout: nn.Module = nn.Identity() if readout is None else readout
        else:
            self.readout = Select(readout)

    def step(self, x: Tensor, u: Tensor | None, h: Tensor | float) -> Tensor:
        """One step of the cell from (batch, state_size) states.

        Args:
            x: states.
            u: (batch, inputs) inputs as `step_inputs` makes them, or None.
            h: step length, used by an `OdeCell` only.
        """
        if isinstance(self.cell, OdeCell):
            following: Tensor = self.cell(x, u, h)
        else:
            following = self.cell(x) if u is None else self.cell(x, u)
        if following.shape != x.shape:
            got = tuple(following.shape)
            raise BindError(
                f"cell {type(self.cell).__name__} returned {got} for states of shape {tuple(x.shape)}: "
                "a cell returns the next state in the shape of the state"
            )
        return following

    def step_inputs(self, inputs: Tensor | None) -> Tensor | None:
        """What the cell reads at each step: u_t, or (u_t, u_{t+1}) where an `OdeCell` interpolates its inputs.

        Args:
            inputs: (batch, N or N-1, m) samples, or None.
        """
        if inputs is None or not (isinstance(self.cell, OdeCell) and self.cell.hold == "linear"):
            return inputs
        following = torch.cat([inputs[:, 1:], inputs[:, -1:]], dim=1)
        return torch.cat([inputs, following], dim=-1)

    def simulate(self, x0: Tensor, inputs: Tensor | None = None, times: Tensor | None = None) -> Tensor:
        """States (batch, steps + 1, state_size) from initial states.

        Args:
            x0: (batch, state_size) or (state_size,) initial states.
            inputs: (batch, steps or more, m) inputs, or None.
            times: (batch, steps + 1 or more) time stamps; None: `dt` everywhere.

        Raises:
            BindError: shapes that do not fit, or inputs that end before the last step.
        """
        x = x0[None] if x0.dim() == 1 else x0
        if x.shape[-1] != self.state_size:
            raise BindError(f"initial states have {x.shape[-1]} numbers, the cell has state_size={self.state_size}")
        if inputs is not None and inputs.shape[1] < self.steps:
            raise BindError(f"inputs have {inputs.shape[1]} rows, a rollout of {self.steps} steps needs as many")
        u = self.step_inputs(inputs)
        states = [x]
        for t in range(self.steps):
            h: Tensor | float = self.dt if times is None else (times[:, t + 1] - times[:, t])[:, None]
            x = self.step(x, None if u is None else u[:, t], h)
            states.append(x)
        return torch.stack(states, dim=1)

    def forward(self, x0: Tensor, inputs: Tensor | None = None, times: Tensor | None = None) -> Tensor:
        """Outputs (batch, steps + 1, outputs) of the simulation; arguments as in `simulate`."""
        states = self.simulate(x0, inputs, times)
        outputs: Tensor = self.readout(states.flatten(0, 1))
        return outputs.unflatten(0, states.shape[:2])
