"""A network from outside: a module or any callable that a Python program hands over in place of a model.

Nothing is known of it but what it does when it is called: what it is given are copies, and what it gives is looked at.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ddim_cli.config.schema import Config
from ddim_cli.config.seeds import parse_classes
from ddim_cli.errors import ConfigError, UsageError
from ddim_cli.sampling.network import Network


def guarded(network: Callable[..., Any]) -> Network:
    """The network as the loop takes it: (x [B, C, H, W], t int64 [B][, classes int64 [B]]) -> prediction of x's shape.

    It gets copies, since one that changes its arguments in place would change the state, or the timesteps of the
    batches after. It may give a tensor, or as diffusers' networks do a tuple or an output object with the prediction
    first. Raises UsageError, when called, for anything else.
    """

    def whole(x: Tensor, timesteps: Tensor, *classes: Tensor) -> Tensor:
        given = network(x.clone(), timesteps.clone(), *(each.clone() for each in classes))
        return _prediction(given, x)

    return whole


def _prediction(given: Any, x: Tensor) -> Tensor:
    """The prediction in what a network gives for ``x``. Raises UsageError where there is none."""
    output = given.to_tuple() if callable(getattr(given, "to_tuple", None)) else given
    output = output[0] if isinstance(output, tuple) and output else output
    wanted = f"it must be a tensor {list(x.shape)}, or a tuple that begins with one"
    if not isinstance(output, Tensor):
        what = "None" if output is None else f"a {type(output).__name__}"
        inside = "" if output is given else " first in a tuple"
        raise UsageError(f"the network gives {what}{inside} for an input of {list(x.shape)}; {wanted}")
    if output.shape != x.shape:
        raise UsageError(f"the network gives {list(output.shape)} for an input of {list(x.shape)}")
    if not output.is_floating_point() or output.device != x.device:
        found = f"{str(output.dtype).removeprefix('torch.')} on {output.device}"
        raise UsageError(f"the network gives {found} for an input on {x.device}; {wanted} of floats, on its device")
    return output


def check_outside(network: Callable[..., Any], config: Config) -> None:
    """Refuse what a network from outside cannot be asked for.

    Raises:
        ConfigError: for guidance without classes or a class that stands for none, and classes or none of them where
            the network's config has it otherwise.
        UsageError: for a network that does not take x and timesteps, and classes where there are some.
    """
    sampling, null_class = config.sampling, config.model.null_class
    if sampling.guidance_scale != 1:
        for key, value in (("sampling.classes", sampling.classes), ("model.null_class", null_class)):
            if value is None:
                raise ConfigError(
                    f"sampling.guidance_scale = {sampling.guidance_scale:g} compares a class with the one that stands "
                    f"for none: set {key} too, or leave guidance out"
                )
    _check_arguments(network, ("x", "t") if sampling.classes is None else ("x", "t", "classes"))
    own = getattr(network, "config", None)
    if isinstance(network, nn.Module) and isinstance(own, Mapping) and "num_class_embeds" in own:
        _check_classes(type(network).__name__, own["num_class_embeds"], sampling.classes, own.get("class_embed_type"))


def _check_arguments(network: Callable[..., Any], names: tuple[str, ...]) -> None:
    call = network.forward if isinstance(network, nn.Module) else network
    try:
        signature = inspect.signature(call)
    except (TypeError, ValueError):
        # Not all that can be called tells how.
        return
    try:
        signature.bind(*names)
    except TypeError as error:
        hint = (
            "sampling.classes is for a network that takes classes as its third argument"
            if "classes" in names
            else "one that takes classes needs sampling.classes"
        )
        raise UsageError(f"the network cannot be called as network({', '.join(names)}): {error}; {hint}") from None


def _check_classes(name: str, count: int | None, classes: str | None, embedding: str | None) -> None:
    """As `resolve` does for a described model."""
    if count is None and embedding is None and classes is not None:
        raise ConfigError(f"sampling.classes = {classes!r}, but this {name} is not class-conditional")
    if count is not None and classes is None:
        raise ConfigError(
            f"this {name} is class-conditional; say which of the classes 0-{count - 1} in sampling.classes"
        )
    if count is not None and classes is not None:
        beyond = next((c for c in parse_classes(classes) if c >= count), None)
        if beyond is not None:
            raise ConfigError(f"sampling.classes: this {name} has no class {beyond}; it has 0-{count - 1}")


def describe_callable(network: Callable[..., Any]) -> dict[str, Any]:
    """What the section ``model`` of a record can say of it: its class or function, and its number of parameters."""
    if isinstance(network, nn.Module):
        return {"class": type(network).__name__, "parameters": sum(p.numel() for p in network.parameters())}
    named = network if hasattr(network, "__qualname__") else type(network)
    return {"class": named.__qualname__, "parameters": None}
