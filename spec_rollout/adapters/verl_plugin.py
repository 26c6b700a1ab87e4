"""What every `import verl` loads by itself (entry point `verl.plugins`).

verl reports a plugin that fails at its debug level only. So this one imports nothing of verl, says
itself that it is there, and warns of what is wrong with the variable SPEC_ROLLOUT before an engine
is started. What uses verl is in `spec_rollout.adapters.verl`, which a run's configuration names.
"""

from __future__ import annotations

import logging
import os
from importlib import metadata

from spec_rollout.engines.vllm.options import VARIABLE, EngineOptions

MANAGER = "spec_rollout.adapters.verl.ReuseManager"
# Versions of verl that the tests have run with.
TESTED = ("0.9.1",)

logger = logging.getLogger(__name__)
logger.setLevel(logging.INFO)  # verl's is WARNING


def untested_version() -> str | None:
    """What to say of the installed verl; None if the tests run with it."""
    try:
        version = metadata.version("verl")
    except metadata.PackageNotFoundError:
        return "verl is not installed as a distribution: its version is not known"
    if version in TESTED:
        return None
    return f"verl {version} is installed, tested is {', '.join(TESTED)}"


def announce() -> None:
    """One line in the log of the process that starts a run; never raises."""
    if "RAY_RAYLET_PID" in os.environ:  # one of Ray's processes
        return
    if (untested := untested_version()) is not None:
        logger.warning("spec_rollout: %s", untested)
    try:
        options = EngineOptions.from_environment()
    except ValueError as error:
        logger.warning("spec_rollout: %s", error)
        return
    logger.info("spec_rollout: %s=%s; drafts per sample by %s", VARIABLE, options.mode, MANAGER)


announce()
