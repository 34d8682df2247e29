"""Every setting there is: its name, type, bounds, default and meaning.

Scheduler keys have diffusers' names and defaults. The classes are frozen and strict: ``"50"`` is
no integer, and ``1`` no boolean; an integer is taken where a float is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ddim_cli.config.seeds import MAX_LENGTH, MAX_SEED, Seeds, format_seeds, parse_classes, parse_seeds
from ddim_cli.diffusion.schedules import SCHEDULES
from ddim_cli.diffusion.spacings import SPACINGS
from ddim_cli.errors import UsageError

if TYPE_CHECKING:
    BetaSchedule = str
    TimestepSpacing = str
else:
    BetaSchedule = Literal[tuple(SCHEDULES)]
    TimestepSpacing = Literal[tuple(SPACINGS)]
PredictionType = Literal["epsilon", "sample", "v_prediction"]
PreviousTimestep = Literal["grid", "diffusers"]
Variance = Literal["ddim", "large"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
OutputFormat = Literal["files", "tar"]
ImageFormat = Literal["png", "webp", "jpg"]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_list_text(value: Any) -> Any:
    """A number or a list of numbers as text of the list grammar; anything else as it is."""
    numbers = value if isinstance(value, list) else [value]
    return ",".join(map(str, numbers)) if numbers and all(type(n) is int and n >= 0 for n in numbers) else value


def _as_seed_list(value: Any) -> Any:
    """A seed or a list of seeds is taken as well, and kept as text; the order given is kept."""
    value = _as_list_text(value)
    if isinstance(value, str):
        seeds = parse_seeds(value)
        return format_seeds(seeds) if seeds.is_ascending else value
    return value


def _as_class_list(value: Any) -> Any:
    """A class or a list of classes is taken as well, and kept as text."""
    value = _as_list_text(value)
    if isinstance(value, str):
        parse_classes(value)
    return value


def _one_or_more(value: Any) -> Any:
    """A list of one is the one; so that however often an option is given, the key reads the same."""
    return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else _as_tuple(value)


def _as_text(value: str) -> str:
    """What a terminal made of bytes that are no text cannot be written into a sidecar."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("is no UTF-8 text") from None
    return value


FloatList = Annotated[tuple[float, ...], BeforeValidator(_as_tuple)]
IntList = Annotated[tuple[int, ...], BeforeValidator(_as_tuple)]
SeedList = Annotated[str, BeforeValidator(_as_seed_list)]
ClassList = Annotated[str, BeforeValidator(_as_class_list)]
Text = Annotated[str, AfterValidator(_as_text)]
Prompts = Annotated[Text | Annotated[tuple[Text, ...], Field(min_length=1)], BeforeValidator(_one_or_more)]
Pixels = Annotated[int, Field(ge=1, le=65536)]
SizePair = Annotated[tuple[Pixels, Pixels], BeforeValidator(_as_tuple)]


@dataclass(frozen=True)
class Flag:
    """The option of the command line that sets a key: its names, and how its value is written and read.

    ``read`` makes the key's value of what was typed, where that is more than a number, a word or a switch; it raises
    UsageError. An option that is ``repeated`` may be given several times, and sets a list.
    """

    names: tuple[str, ...]
    metavar: str | None = None
    read: Callable[[str], Any] | None = None
    repeated: bool = False

    @property
    def parameter(self) -> str:
        """The long name as Python has it: ``--num-images`` -> num_images."""
        return self.names[0].partition("/")[0].removeprefix("--").replace("-", "_")


def flag(
    *names: str, metavar: str | None = None, read: Callable[[str], Any] | None = None, repeated: bool = False
) -> Flag:
    """``Annotated[int, flag("--steps", metavar="N")]`` gives a key an option."""
    return Flag(names, metavar, read, repeated)


def _number_or_word(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _size(text: str) -> int | list[int]:
    """``"32"``, or ``"32x48"``: height and width. Raises UsageError."""
    match = re.fullmatch(r"([0-9]{1,9})(?:[xX]([0-9]{1,9}))?", text.strip())
    if match is None:
        raise UsageError(f"--image-size {text}: write a number of pixels, or height and width, for example 32x48")
    height, width = match.groups()
    return int(height) if width is None else [int(height), int(width)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class ModelSettings(Section):
    """Which network to sample from."""

    source: Annotated[str, flag("--model", "-m", metavar="SOURCE")] = Field(
        "mnist",
        min_length=1,
        description="Model: a bundled name, a diffusers directory, a checkpoint or safetensors file, either of these "
        "by its URL (s3://...), or a Hub id",
    )
    revision: str | None = Field(
        None, examples=["main"], min_length=1, description="Branch, tag or commit of a model on the Hub [main]"
    )
    variant: str | None = Field(
        None, examples=["fp16"], description="Variant of the weights: diffusion_pytorch_model.VARIANT.safetensors"
    )
    subfolder: str | None = Field(
        None, examples=["unet"], description="Folder of the network inside the source [unet, or the root]"
    )
    ema: bool = Field(True, description="Take the averaged weights of an original training checkpoint")
    image_size: Annotated[Pixels | SizePair | None, flag("--image-size", metavar="N|HxW", read=_size)] = Field(
        None, examples=[32], description="Size of an image in pixels, or height and width as 32x48 [the model's]"
    )
    null_class: int | None = Field(
        None, examples=[10], ge=0, description="Class that stands for no class, for classifier-free guidance"
    )
    latent_scale: float | None = Field(
        None,
        examples=[0.18215],
        gt=0,
        le=1e30,
        description="Scale of a latent model's latents: they are divided by it before they are decoded [the model's]",
    )


class SchedulerSettings(Section):
    """The diffusion the network was trained on, and how x0 is treated; diffusers' keys and defaults."""

    num_train_timesteps: int = Field(1000, ge=1, le=1_000_000, description="Number of diffusion steps in training, T")
    beta_start: float = Field(0.0001, ge=0, lt=1, description="First beta")
    beta_end: float = Field(0.02, ge=0, lt=1, description="Last beta")
    beta_schedule: Annotated[BetaSchedule, flag("--beta-schedule", metavar="NAME")] = Field(
        "linear", description="Noise schedule, from beta_start to beta_end"
    )
    trained_betas: FloatList | None = Field(
        None, examples=[[0.0001, 0.02]], description="T betas, in place of the schedule"
    )
    prediction_type: Annotated[PredictionType, flag("--prediction-type", metavar="NAME")] = Field(
        "epsilon", description="What the network predicts"
    )
    clip_sample: Annotated[bool, flag("--clip-sample/--no-clip-sample")] = Field(
        True, description="Clip each predicted x0 to +-clip_sample_range"
    )
    clip_sample_range: float = Field(1.0, gt=0, le=1e30, description="Bound of clip_sample")
    thresholding: Annotated[bool, flag("--thresholding/--no-thresholding")] = Field(
        False, description="Threshold x0 dynamically (arXiv:2205.11487), in place of clipping"
    )
    dynamic_thresholding_ratio: float = Field(0.995, gt=0, le=1, description="Quantile of |x0| that is the threshold")
    sample_max_value: float = Field(1.0, ge=1, le=1e30, description="Largest threshold")
    timestep_spacing: Annotated[TimestepSpacing, flag("--spacing", metavar="NAME")] = Field(
        "leading", description="How the timesteps are spaced"
    )
    steps_offset: int = Field(0, ge=0, le=1_000_000, description="Added to every timestep of leading spacing")
    set_alpha_to_one: bool = Field(True, description="Take alpha_bar 1 after the last step, else that of timestep 0")
    rescale_betas_zero_snr: bool = Field(False, description="Rescale the betas to zero terminal SNR (arXiv:2305.08891)")
    previous_timestep: PreviousTimestep = Field(
        "grid", description="Where a step goes: to the next timestep of the grid, or by diffusers' stride of T // N"
    )


class SamplingSettings(Section):
    """Which pictures, in how many steps."""

    steps: Annotated[int, flag("--steps", metavar="N")] = Field(
        50, ge=1, le=1_000_000, description="Number of denoising steps N"
    )
    timesteps: IntList | None = Field(
        None, examples=[[999, 666, 333]], min_length=1, description="Descending list of timesteps, in place of steps"
    )
    eta: Annotated[float, flag("--eta", metavar="X")] = Field(
        0.0, ge=0, description="Noise of the steps: 0 for DDIM, which is deterministic, 1 for DDPM's"
    )
    order: Annotated[int, flag("--order", metavar="1|2|3")] = Field(
        1,
        ge=1,
        le=3,
        description="Order of the solver: 1 is DDIM; 2 and 3 use the steps before, and need fewer for much the same",
    )
    refine: Annotated[int, flag("--refine", metavar="K")] = Field(
        0,
        ge=0,
        le=1000,
        description="Fixed-point iterations for each step up of an inversion, so that the step down undoes it",
    )
    variance: Variance = Field(
        "ddim", description='Variance of the noise; "large" is the paper\'s sigma-hat, and implies eta 1'
    )
    use_clipped_model_output: bool = Field(False, description="Derive epsilon again from the clipped x0")
    num_images: Annotated[int, flag("--num-images", "-n", metavar="N")] = Field(
        16, ge=1, le=MAX_LENGTH, description="Number of images"
    )
    seed: Annotated[int, flag("--seed", metavar="S")] = Field(
        0, ge=0, le=MAX_SEED, description="Seed of the first image; the next image has the next seed"
    )
    seeds: Annotated[SeedList | None, flag("--seeds", metavar="LIST")] = Field(
        None,
        examples=["0-63,100"],
        description='Seeds as a list, for example "0-63,100", in place of seed and num_images',
    )
    batch_size: Annotated[
        Annotated[int, Field(ge=1)] | Literal["auto"], flag("--batch-size", "-b", metavar="N", read=_number_or_word)
    ] = Field("auto", description="Number of images in a batch")
    classes: Annotated[ClassList | None, flag("--classes", metavar="LIST")] = Field(
        None,
        examples=["0-9"],
        description='Classes as a list, for example "3" or "0-9"; an image has classes[seed mod their number]',
    )
    prompt: Annotated[Prompts | None, flag("--prompt", metavar="TEXT", repeated=True)] = Field(
        None,
        examples=["a bold seven"],
        description="What a text-to-image model is to show; of several, an image has prompts[seed mod their number]",
    )
    negative_prompt: Annotated[Text | None, flag("--negative-prompt", metavar="TEXT")] = Field(
        None, examples=["thin"], description="What guidance is to lead away from"
    )
    guidance_scale: Annotated[float, flag("--guidance-scale", metavar="W")] = Field(
        1.0, ge=0, description="Scale of classifier-free guidance; text-to-image models have 7.5, and 1 turns it off"
    )
    guidance_rescale: Annotated[float, flag("--guidance-rescale", metavar="R")] = Field(
        0.0, ge=0, le=1, description="Rescaling of guided predictions (arXiv:2305.08891, section 3.4)"
    )

    init: Annotated[Text | None, flag("--init", metavar="FILE")] = Field(
        None,
        examples=["photo.png"],
        min_length=1,
        description="Picture to begin from, in place of noise alone; strength says how much of it may change",
    )
    strength: Annotated[float | None, flag("--strength", metavar="X")] = Field(
        None,
        examples=[0.6],
        gt=0,
        le=1,
        description="Share of the grid that runs: how much a picture changes, above 0 up to 1 "
        "[0.8; with a mask, and to edit, 1]",
    )
    mask: Annotated[Text | None, flag("--mask", metavar="FILE")] = Field(
        None,
        examples=["mask.png"],
        min_length=1,
        description="Which part of the picture is made anew: what is white in this one; grey blends",
    )
    resample: Annotated[int, flag("--resample", metavar="R")] = Field(
        1,
        ge=1,
        le=100,
        description="How often each step runs beside a mask, with jumps back up (RePaint, arXiv:2201.09865)",
    )
    variation_seed: Annotated[int | None, flag("--variation-seed", metavar="S")] = Field(
        None, examples=[1], ge=0, le=MAX_SEED, description="Seed towards whose noise each image's own is turned"
    )
    variation_strength: Annotated[float, flag("--variation-strength", metavar="X")] = Field(
        0.0, ge=0, le=1, description="How far it is turned: 0 is an image's own noise, 1 that of variation_seed"
    )

    @model_validator(mode="before")
    @classmethod
    def _large_variance_implies_eta_1(cls, values: Any) -> Any:
        """So that nobody else has to ask."""
        if isinstance(values, dict) and values.get("variance") == "large" and "eta" not in values:
            return {**values, "eta": 1.0}
        return values

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts that a plan draws from; empty where none is set."""
        if self.prompt is None:
            return ()
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt

    @property
    def draws_noise(self) -> bool:
        """Whether steps add noise."""
        return self.eta > 0


class RuntimeSettings(Section):
    """Where and how it runs."""

    device: Annotated[str, flag("--device", metavar="NAME")] = Field(
        "auto",
        pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$",
        description="Device to run on: auto, cpu, cuda, cuda:N or mps",
    )
    dtype: Annotated[DType, flag("--dtype", metavar="NAME")] = Field(
        "auto", description="Precision of the network; auto is bfloat16 on a GPU that has it, else float32"
    )
    tf32: bool = Field(False, description="Allow TF32 in float32 arithmetic on a GPU")
    compile: Annotated[bool | Literal["auto"], flag("--compile/--no-compile")] = Field(
        "auto", description="Compile the network, and keep the code for later runs; auto: if that pays"
    )
    offload: bool | Literal["auto"] = Field(
        "auto",
        description="Free the memory of text encoder and autoencoder while the network runs; auto: where that helps",
    )
    tile: bool = Field(
        False, description="Decode large pictures in tiles, for less memory; where tiles meet, pixels change"
    )


class OutputSettings(Section):
    """What lands on disk."""

    dir: Annotated[str | None, flag("--out", "-o", metavar="DIR")] = Field(
        None, examples=["outputs/mine"], min_length=1, description="Output folder [outputs/MODEL-Nsteps-HASH]"
    )
    grid: Annotated[bool, flag("--grid/--no-grid")] = Field(
        True, description="Write grid.png, a contact sheet of the first images"
    )
    subdirs: Annotated[bool, flag("--subdirs/--no-subdirs")] = Field(
        False, description="Write a folder for every 1,000 seeds, named after the first"
    )
    format: Annotated[OutputFormat, flag("--format", metavar="NAME")] = Field(
        "files", description="Write two files a picture, or tar shards of many, as WebDataset reads them"
    )
    shard_size: int = Field(
        1000, ge=1, le=MAX_LENGTH, description="Number of pictures in a tar shard, which appears whole"
    )
    image_format: Annotated[ImageFormat, flag("--image-format", metavar="NAME")] = Field(
        "png", description="Format of the pictures; png and webp keep every pixel"
    )
    quality: Annotated[int, flag("--quality", metavar="N")] = Field(
        95, ge=1, le=100, description="Quality of JPEG, 1 to 100; the other formats have none"
    )
    parameters: Annotated[bool, flag("--parameters/--no-parameters")] = Field(
        True, description="Write the text into pictures of text-to-image models that other image tools read"
    )
    fsync: Annotated[bool, flag("--fsync/--no-fsync")] = Field(
        False, description="Wait until each file is on the disk, so that it survives a power cut"
    )


class Config(Section):
    """All settings of a run."""

    model: ModelSettings = ModelSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    sampling: SamplingSettings = SamplingSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    output: OutputSettings = OutputSettings()

    def seeds(self) -> Seeds:
        """The seeds of the plan, in the order in which images are numbered for shards."""
        if self.sampling.seeds is not None:
            return parse_seeds(self.sampling.seeds)
        return Seeds.of(range(self.sampling.seed, self.sampling.seed + self.sampling.num_images))


SECTIONS: dict[str, type[Section]] = {name: type(field.default) for name, field in Config.model_fields.items()}
KEYS: tuple[str, ...] = tuple(f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields)
# Dotted key -> its option, of those that have one.
FLAGS: dict[str, Flag] = {
    f"{name}.{key}": found
    for name, section in SECTIONS.items()
    for key, field in section.model_fields.items()
    for found in field.metadata
    if isinstance(found, Flag)
}
