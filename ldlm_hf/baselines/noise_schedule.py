"""What MDLM, Duo and CANDI share of their noise: the log-linear schedule, its time grids, and how times are drawn.

Time t in [0, 1], 0 = clean and 1 = noise; alpha_t is the probability that a token is untouched.
"""

from __future__ import annotations

import torch


# alpha at t = 1 and the earliest time of training (MDLM's and Duo's code: e = 1e-3)
ALPHA_END = 1e-3
TIME_MIN = 1e-3
# where sampling ends
LAST_TIME = 1e-5


def log_linear_alpha(times: torch.Tensor, alpha_end: float = ALPHA_END) -> torch.Tensor:
    """alpha_t = 1 - (1 - e) t, of any shape and type (Sahoo et al., 2024)."""
    return 1 - (1 - alpha_end) * times


def stratified_times(uniforms: torch.Tensor, first_row: int, batch_size: int) -> torch.Tensor:
    """u_j = (j + U_j) / n, one draw in each of n equal parts of [0, 1): for rows from `first_row` on, of n in all.

    Args:
        uniforms: U_j in [0, 1), of shape (rows,).
        first_row: place of the first of them in the whole batch.
        batch_size: n.
    """
    places = torch.arange(first_row, first_row + len(uniforms), dtype=torch.float64, device=uniforms.device)
    return (places + uniforms.double()) / batch_size


def training_times(uniforms: torch.Tensor) -> torch.Tensor:
    """t = 1e-3 + (1 - 1e-3) u."""
    return TIME_MIN + (1 - TIME_MIN) * uniforms


def linear_grid(num_steps: int, first: float = 1.0) -> torch.Tensor:
    """`num_steps + 1` even times from `first` down to 1e-5, float64."""
    return torch.linspace(first, LAST_TIME, num_steps + 1, dtype=torch.float64)


def grid_parts(num_times: int, high: float, middle: float) -> tuple[int, int, int]:
    """How many of the times belong to the high, the middle and the low part of a grid, by shares of them."""
    first = round(high * num_times)
    second = min(round(middle * num_times), num_times - first)
    return first, second, num_times - first - second


def loop_grid(num_steps: int, loop_time: float, high: float, middle: float) -> torch.Tensor:
    """`num_steps + 1` times, down to `loop_time`, at it, and down to 1e-5 (ReMDM's loop), float64.

    Joints repeat a time; with few steps the last part may be `loop_time` alone.
    """
    parts = grid_parts(num_steps + 1, high, middle)
    ends = ((1.0, loop_time), (loop_time, loop_time), (loop_time, LAST_TIME))
    return torch.cat(
        [torch.linspace(*end, count, dtype=torch.float64) for end, count in zip(ends, parts, strict=True)]
    )


def is_loop_step(index: int, num_times: int, high: float, middle: float) -> bool:
    """Whether a step of [`loop_grid`] is one of the middle part, whose last one leads out of it."""
    first, count, _ = grid_parts(num_times, high, middle)
    return first <= index < first + count - 1
