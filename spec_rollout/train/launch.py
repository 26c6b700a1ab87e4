"""How the trainer was started."""

from __future__ import annotations

from collections.abc import Mapping

from spec_rollout.config.sections import ConfigError

# Set for every process of several by torchrun, accelerate and deepspeed; Open MPI; other MPIs.
_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def check_one_process(environment: Mapping[str, str]) -> None:
    """Raises ConfigError in one of several processes that a launcher started alike.

    The trainer is one process: each of them would train the whole run, into the same folder.

    Args:
        environment: Variables of the process.
    """
    for name in _SIZES:
        size = environment.get(name, "")
        if size.isdecimal() and int(size) > 1:
            raise ConfigError(
                f"{name}: expected 1 or nothing in the environment (the trainer is one process; "
                "each of several would train the whole run into the same folder), got "
                f"{size!r}; start it without torchrun, accelerate launch or mpirun, or, if you "
                f"did, with `env -u {name} spec-rollout train ...`"
            )
