"""What an experiment that begins at given states asks of the settings. Needs no torch."""

from __future__ import annotations

from ddim_cli.config.seeds import parse_classes
from ddim_cli.errors import UsageError
from ddim_cli.sampling.resolve import Run


def check_deterministic(run: Run, reason: str) -> None:
    """UsageError unless eta is 0, with the ``reason`` and where the other value came from."""
    settings = run.config.sampling
    if settings.variance == "large":
        key, value = "sampling.variance", '"large", which implies eta 1'
    elif settings.eta != 0:
        key, value = "sampling.eta", f"{settings.eta}"
    else:
        return
    raise UsageError(f"{key} = {value} ({run.resolved.origin(key)}): {reason}")


def one_class(run: Run) -> int | None:
    """The class of all pictures, None of an unconditional network. UsageError where several are named."""
    if run.config.sampling.classes is None:
        return None
    classes = parse_classes(run.config.sampling.classes)
    if len(set(classes)) > 1:
        raise UsageError(
            f"--classes {run.config.sampling.classes}: pictures that begin at no seed take one class for all; name one"
        )
    return classes[0]
