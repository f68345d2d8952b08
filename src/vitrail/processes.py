"""What launchers say of this process, before several have met: whether it is the first, and how many there are."""

from __future__ import annotations

import os

NUMBERS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
"""where launchers say which of several processes this one is"""
COUNTS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""where they say how many they have started"""


def is_first() -> bool:
    """Whether this process is alone, or the one of several that speaks and writes."""
    return all(os.environ.get(name, "0") == "0" for name in NUMBERS)


def refuse_strangers(wanted: int) -> None:
    """Raises `ValueError` where a launcher started other processes than the run is to have: each would train alone."""
    for name in COUNTS:
        started = int(os.environ.get(name, wanted))
        if started > 1 and started != wanted:
            raise ValueError(
                f"--devices times --num-nodes must be the number of processes that were started; got {wanted} where "
                f"{name} is {started}: give --devices (processes on one machine) and --num-nodes"
            )
