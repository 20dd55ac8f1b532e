"""The adaptive timestep sampler that a run's checkpoints hold."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from ..objective import AdaptiveTimestepSampler
from .checkpoints import find_checkpoints


def load_timestep_sampler(path: Path) -> AdaptiveTimestepSampler:
    """The sampler of a run's newest checkpoint, of a checkpoint, or of its file.

    Raises:
        OSError: there is no such file, or it is none of a checkpoint.
        ValueError: the run sampled uniformly.
    """
    file = path / "rank_0.pt" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        checkpoints = find_checkpoints(path)
        if not checkpoints:
            raise OSError(f"--timestep_sampler {str(path)!r} holds no checkpoint; use --proposal log_snr.")
        file = checkpoints[-1] / "rank_0.pt"
    if not file.is_file():
        raise OSError(f"--timestep_sampler {str(path)!r}: there is no {file.name}; use --proposal log_snr.")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)["task"]
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError) as error:
        raise OSError(f"--timestep_sampler {str(path)!r}: {file.name} is no file of a checkpoint.") from error
    if not state:
        raise ValueError(
            f"--timestep_sampler {str(path)!r} belongs to a run that sampled its times uniformly; use --proposal "
            "uniform or log_snr."
        )
    sampler = AdaptiveTimestepSampler(num_bins=state["num_bins"])
    sampler.load_state_dict(state)
    return sampler
