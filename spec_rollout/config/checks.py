"""How a section checks its values."""

from __future__ import annotations


class ConfigError(ValueError):
    """A value in the config is not usable; the message names section and key."""


def require(ok: bool, key: str, expected: str, got: object) -> None:
    """Raises ConfigError unless `ok`."""
    if not ok:
        raise ConfigError(f"{key}: expected {expected}, got {got!r}")


def at_least(minimum: int, section: str, config: object, *names: str) -> None:
    """Each named field is None or at least `minimum`."""
    for name in names:
        value = getattr(config, name)
        require(
            value is None or value >= minimum, f"{section}.{name}", f"at least {minimum}", value
        )
