"""What an experiment that starts from given states asks of the settings. Needs no torch."""

from __future__ import annotations

from ddim_cli.errors import UsageError
from ddim_cli.sampling.resolve import Run


def check_deterministic(run: Run, reason: str) -> None:
    """UsageError unless eta is 0, with the ``reason`` and where the other value came from."""
    settings = run.config.sampling
    if not settings.draws_noise:
        return
    key, value = "sampling.eta", f"{settings.eta}"
    if settings.variance != "ddim":
        key, value = "sampling.variance", f'"{settings.variance}", which implies eta 1'
    raise UsageError(f"{key} = {value} ({run.resolved.origin(key)}): {reason}")
