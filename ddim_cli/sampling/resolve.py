"""From layers of settings to a run that is known to work: join in the model's own scheduler, lay out the grid.

Reads JSON and TOML only; torch and the weights come later.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ddim_cli.config.layers import Layer, Resolved, merge, validate_layer
from ddim_cli.config.schema import KEYS, Config, ModelSettings, SchedulerSettings
from ddim_cli.config.seeds import MAX_SEED, parse_classes
from ddim_cli.diffusion.grids import timestep_grid
from ddim_cli.diffusion.resampling import JUMP
from ddim_cli.diffusion.rules import check_combination
from ddim_cli.errors import ConfigError, ModelError
from ddim_cli.models.describe import ModelDescription, describe_model
from ddim_cli.sampling.init import Init, check_beginning, named, read_init
from ddim_cli.sampling.items import Begins, Shape

# A network only makes sense of the diffusion it was trained on.
TRAINED_KEYS = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)
LOWEST_START = 0.75


@dataclass(frozen=True)
class Run:
    """Settings that hold together, the model they are for (None where none was looked up) and the grid that runs.

    ``of_rows``: its pictures are the rows of a job file, which bring prompts and, with ``classes_follow``, classes.
    ``init`` is the picture that all of them begin from, where there is one. ``of_edits``: they are pictures that are
    inverted, and sampled as something else.
    """

    resolved: Resolved
    described: ModelDescription | None
    timesteps: tuple[int, ...]
    warnings: tuple[str, ...] = ()
    of_rows: bool = False
    classes_follow: bool = False
    init: Init | None = None
    of_edits: bool = False

    @property
    def config(self) -> Config:
        return self.resolved.config

    @property
    def begins(self) -> Begins:
        """How the pictures of its seeds begin."""
        settings = self.config.sampling
        turned = settings.variation_seed is not None and settings.variation_strength > 0
        variation = (settings.variation_seed or 0, settings.variation_strength) if turned else None
        return Begins(variation) if self.init is None else Begins(variation, self.init.begin, self.init.canvas)

    @property
    def takes_classes(self) -> bool:
        """Whether its network is called with classes."""
        return self.classes_follow or self.config.sampling.classes is not None

    @property
    def model(self) -> ModelDescription:
        """The model, where there is one. Raises LookupError of a network from outside, and a model not looked up."""
        if self.described is None:
            raise LookupError("this run has no described model")
        return self.described


def with_init(run: Run, shape: Shape | None = None) -> Run:
    """The run, with the picture that it names read; ``shape`` is of pictures of a network from outside.

    Raises as `read_init`.
    """
    settings = run.config.sampling
    if settings.init is None:
        return run
    picture, mask = named(settings.init), None if settings.mask is None else named(settings.mask)
    init = read_init(run.timesteps, shape or run.model.shape, picture, mask, settings.strength, settings.order)
    warnings = run.warnings
    if settings.resample > 1 and len(run.timesteps) - init.begin <= JUMP:
        warnings = (*warnings, f"sampling.resample has no effect in {JUMP} steps or fewer, which is how far it jumps")
    return replace(run, init=init, warnings=warnings)


def refuse_init(run: Run, what: str, but: Sequence[str] = ()) -> None:
    """ConfigError for settings of what pictures begin from, where ``what``, the rest of the sentence, says why not.

    Those of ``but`` are left alone.
    """
    settings = run.config.sampling
    said = {key: getattr(settings, key) for key in ("init", "mask", "strength", "variation_seed")}
    said["resample"] = settings.resample if settings.resample > 1 else None
    for key, value in said.items():
        if value is not None and key not in but:
            problem = f"sampling.{key} says what pictures begin from, and {what}"
            raise ConfigError(_with_origins(problem, run.resolved))


def without_refinement(run: Run) -> Run:
    """The run of pictures that are not inverted: `sampling.refine` bears on none of them."""
    config = run.config
    if not config.sampling.refine:
        return run
    changed = config.model_copy(update={"sampling": config.sampling.model_copy(update={"refine": 0})})
    return replace(run, resolved=replace(run.resolved, config=changed))


def writes_png(run: Run) -> Run:
    """The run of a command whose pictures are PNGs in files of their own, whatever [output] says; it warns where that
    says otherwise."""
    output, warnings = run.config.output, []
    for key, here in (("image_format", "png"), ("format", "files")):
        value = getattr(output, key)
        if value != here:
            warning = f'output.{key} = "{value}" has no effect here, where each picture is a PNG of its own'
            warnings.append(_with_origins(warning, run.resolved))
            output = output.model_copy(update={key: here})
    if not warnings:
        return run
    config = run.config.model_copy(update={"output": output})
    return replace(run, resolved=replace(run.resolved, config=config), warnings=(*run.warnings, *warnings))


def _trained_differently(resolved: Resolved, layer: Layer, model: ModelDescription) -> list[str]:
    if model.scheduler is None:
        return []
    trained = merge([layer]).config.scheduler
    chosen = resolved.config.scheduler
    if chosen.trained_betas is not None and chosen.trained_betas == trained.trained_betas:
        return []
    return [
        f"scheduler.{key} = {getattr(chosen, key)!r} ({resolved.origin(f'scheduler.{key}')}) is not the "
        f"{getattr(trained, key)!r} that {model.name} was trained with; expect garbage"
        for key in TRAINED_KEYS
        if getattr(chosen, key) != getattr(trained, key)
    ]


def _latents_are_clipped(resolved: Resolved, model: ModelDescription) -> list[str]:
    scheduler = resolved.config.scheduler
    if model.latents is None or not (scheduler.clip_sample or scheduler.thresholding):
        return []
    key = "thresholding" if scheduler.thresholding else "clip_sample"
    return [f"scheduler.{key} bounds latents, whose range is not that of pictures; expect dull pictures"]


def _nothing_to_lead_away_from(resolved: Resolved) -> list[str]:
    settings = resolved.config.sampling
    if settings.negative_prompt is None or settings.guidance_scale != 1:
        return []
    return ["sampling.negative_prompt has no effect at a guidance scale of 1, which turns guidance off"]


def _quality_of_nothing(resolved: Resolved) -> list[str]:
    output = resolved.config.output
    if output.image_format == "jpg" or resolved.origin("output.quality") == "default":
        return []
    return [f"output.quality is of JPEG, and has no effect on {output.image_format}, which keeps every pixel"]


def _starts_low(scheduler: SchedulerSettings, timesteps: Sequence[int]) -> list[str]:
    total = scheduler.num_train_timesteps
    if timesteps[0] >= LOWEST_START * total:
        return []
    return [
        f"the grid starts at timestep {timesteps[0]}, below {LOWEST_START} of the {total} of training: pure noise is "
        "not what the network expects there; expect garbage"
    ]


def _with_origins(problem: str, resolved: Resolved) -> str:
    """The problem, and where the values of the keys that it names come from."""
    named = [key for key in dict.fromkeys(re.findall(r"\w+\.\w+", problem)) if key in KEYS]
    origins = [f"{key}: {resolved.origin(key)}" for key in named if resolved.origin(key) != "default"]
    return f"{problem} ({', '.join(origins)})" if origins else problem


def _check_last_seed(config: Config) -> None:
    settings = config.sampling
    if settings.seeds is None and settings.seed + settings.num_images - 1 > MAX_SEED:
        raise ConfigError(
            f"sampling.seed = {settings.seed} leaves no room for sampling.num_images = {settings.num_images}"
        )


def _other_length(config: Config, timesteps: Sequence[int]) -> list[str]:
    settings = config.sampling
    if settings.timesteps is not None or len(timesteps) == settings.steps:
        return []
    spacing = config.scheduler.timestep_spacing
    return [f"the {spacing} grid for {settings.steps} steps has {len(timesteps)} timesteps, and so many run"]


def settle(
    resolved: Resolved,
    model: ModelDescription | None = None,
    warnings: Sequence[str] = (),
    conditions_follow: bool = False,
) -> Run:
    """Settle a run: lay out its grid and refuse settings that cannot work.

    With ``conditions_follow`` the items bring classes or prompts of their own, or none are needed. Raises ConfigError.
    """
    config = resolved.config
    try:
        _check_last_seed(config)
        timesteps = tuple(timestep_grid(config.scheduler, config.sampling))
        check_combination(config.scheduler, config.sampling, timesteps)
        check_beginning(config.sampling, conditions_follow)
        if model is not None:
            _check_network(config, model, timesteps, conditions_follow)
    except ConfigError as error:
        raise ConfigError(*(_with_origins(p, resolved) for p in error.problems)) from None
    notes = model.notes if model is not None else ()
    return Run(
        resolved,
        model,
        timesteps,
        (*notes, *warnings, *_other_length(config, timesteps), *_starts_low(config.scheduler, timesteps)),
    )


def _check_prompts(config: Config, model: ModelDescription, conditions_follow: bool) -> None:
    """Raise ConfigError for a text-to-image model without a prompt, and a prompt for any other."""
    settings = config.sampling
    if not model.takes_text:
        for key, value in (("prompt", settings.prompt), ("negative_prompt", settings.negative_prompt)):
            if value is not None:
                raise ConfigError(
                    f"sampling.{key} is for text-to-image models, such as mnist-text; {model.name} takes no text"
                )
        return
    if settings.classes is not None:
        raise ConfigError(f"sampling.classes = {settings.classes!r}, but {model.name} takes a prompt, not a class")
    if settings.prompt is None and not conditions_follow:
        raise ConfigError(f'{model.name} takes text; say what it is to show, for example with --prompt "seven"')


def _check_classes(config: Config, model: ModelDescription, conditions_follow: bool) -> None:
    """Raise ConfigError unless the classes asked for are ones that the network has."""
    settings, null_class = config.sampling, config.model.null_class
    if model.takes_text:
        if null_class is not None:
            raise ConfigError(f"model.null_class is for class-conditional networks; {model.name} takes text")
        return
    embedding = model.network.get("class_embed_type")
    if embedding is not None:
        raise ConfigError(
            f"{model.name} has class_embed_type {embedding!r}, whose classes are not numbers; it loads, but sample "
            "cannot condition it"
        )
    if model.classes is None:
        if settings.classes is not None:
            raise ConfigError(f"sampling.classes = {settings.classes!r}, but {model.name} is not class-conditional")
        if settings.guidance_scale != 1 or null_class is not None:
            key = "model.null_class" if null_class is not None else "sampling.guidance_scale"
            raise ConfigError(f"{key} is for class-conditional networks; {model.name} is not one")
        return
    allowed = f"0-{model.classes - 1}"
    if settings.classes is None and not conditions_follow:
        raise ConfigError(f"{model.name} is class-conditional; say which of the classes {allowed} with --classes")
    classes = parse_classes(settings.classes) if settings.classes is not None else ()
    beyond = next((c for c in classes if c >= model.classes), None)
    if beyond is not None:
        raise ConfigError(f"sampling.classes: {model.name} has no class {beyond}; it has {allowed}")
    if null_class is not None and null_class >= model.classes:
        raise ConfigError(f"model.null_class = {null_class}: {model.name} has the classes {allowed}")
    if settings.guidance_scale != 1 and null_class is None:
        raise ConfigError(
            "sampling.guidance_scale needs to know which class stands for none: set model.null_class, one of "
            f"{allowed} (often the last)"
        )


def _check_inpainting(config: Config, model: ModelDescription, conditions_follow: bool) -> None:
    """Raise ConfigError for a network that fills in masks, and is given none."""
    settings = config.sampling
    if not model.inpaints:
        return
    if settings.resample > 1:
        raise ConfigError(
            f"sampling.resample = {settings.resample} is for networks that know of no mask; {model.name} is given it"
        )
    if (settings.init is None or settings.mask is None) and not conditions_follow:
        raise ConfigError(
            f"{model.name} fills in a part of a picture, and is for ddim sample: name the picture with --init, and "
            "what to make anew with --mask"
        )


def _check_network(config: Config, model: ModelDescription, timesteps: Sequence[int], conditions_follow: bool) -> None:
    """Raise ConfigError where this network cannot run these settings."""
    _check_prompts(config, model, conditions_follow)
    _check_classes(config, model, conditions_follow)
    _check_inpainting(config, model, conditions_follow)
    if model.latents is None and config.model.latent_scale is not None:
        raise ConfigError(f"model.latent_scale is for latent models; {model.name} has no autoencoder")
    if model.network.get("time_embedding_type") == "fourier" and 0 in timesteps:
        raise ConfigError(
            f"{model.name} embeds log t, and the grid contains timestep 0; use scheduler.steps_offset = 1, or an "
            "explicit sampling.timesteps without 0"
        )


def _swept_elsewhere(layers: Sequence[Layer]) -> list[str]:
    sweeps = [layer.sweep for layer in layers if layer.sweep is not None]
    return [f"{where('sweep')}: [sweep] is for ddim sweep, and left out here" for _, where in sweeps]


def resolve(
    layers: Sequence[Layer],
    cached_only: bool = False,
    describe: Callable[[ModelSettings, bool], ModelDescription] = describe_model,
    conditions_follow: bool = False,
    reads_init: bool = True,
) -> Run:
    """Join ``layers`` (lowest first) and the model's own scheduler config into a run.

    With ``cached_only`` a model on the Hub is taken from the cache, and nobody is asked. ``describe`` finds the model.
    ``conditions_follow`` is as `settle` has it. Unless it ``reads_init``, the picture that pictures begin from is not
    looked at.

    Raises:
        ConfigError: for settings that cannot work together.
        ModelError: for a model that is not there or cannot be sampled from.
    """
    model = describe(merge(layers).config.model, cached_only)
    layer = model.settings_layer()
    validate_layer(layer)
    resolved = merge([layer, *layers])
    warnings = [
        *_swept_elsewhere(layers),
        *_trained_differently(resolved, layer, model),
        *_latents_are_clipped(resolved, model),
        *_nothing_to_lead_away_from(resolved),
        *_quality_of_nothing(resolved),
    ]
    run = settle(resolved, model, warnings, conditions_follow)
    return with_init(run) if reads_init else run


def resolve_loosely(layers: Sequence[Layer], describe: Callable[..., ModelDescription] = describe_model) -> Run:
    """As `resolve`, but a model that cannot be opened is no error: the settings are checked without it.

    Nor is it one that there is no class or prompt yet, which the command line may bring.
    """
    try:
        return resolve(layers, cached_only=True, describe=describe, conditions_follow=True, reads_init=False)
    except ModelError as error:
        run = settle(merge(layers))
        return replace(run, warnings=(*run.warnings, f"checked without the model's own scheduler settings: {error}"))
