"""Every setting there is: its name, type, bounds, default and meaning.

Scheduler keys have diffusers' names and defaults. The classes are frozen and strict: ``"50"`` is
no integer, and ``1`` no boolean; an integer is taken where a float is asked for.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ddim_cli.config.seeds import MAX_LENGTH, MAX_SEED, Seeds, format_seeds, parse_classes, parse_seeds

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp"]
PredictionType = Literal["epsilon", "sample", "v_prediction"]
TimestepSpacing = Literal["leading", "trailing", "linspace", "quadratic", "uniform"]
PreviousTimestep = Literal["grid", "diffusers"]
Variance = Literal["ddim", "large"]
DType = Literal["auto", "float32", "bfloat16", "float16"]


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


FloatList = Annotated[tuple[float, ...], BeforeValidator(_as_tuple)]
IntList = Annotated[tuple[int, ...], BeforeValidator(_as_tuple)]
SeedList = Annotated[str, BeforeValidator(_as_seed_list)]
ClassList = Annotated[str, BeforeValidator(_as_class_list)]
Pixels = Annotated[int, Field(ge=1, le=65536)]
SizePair = Annotated[tuple[Pixels, Pixels], BeforeValidator(_as_tuple)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class ModelSettings(Section):
    """Which network to sample from."""

    source: str = Field(
        "mnist",
        min_length=1,
        description="a bundled name, a diffusers directory, a checkpoint or safetensors file, or a Hub id",
    )
    revision: str | None = Field(
        None, examples=["main"], min_length=1, description="of a model on the Hub: a branch, tag or commit [main]"
    )
    variant: str | None = Field(
        None, examples=["fp16"], description="weights variant: diffusion_pytorch_model.VARIANT.safetensors"
    )
    subfolder: str | None = Field(
        None, examples=["unet"], description="the network's folder inside the source [unet, or the root]"
    )
    ema: bool = Field(True, description="of an original training checkpoint, take the averaged weights")
    image_size: Pixels | SizePair | None = Field(
        None, examples=[32], description="an image's size, or [height, width] [the model's]"
    )
    null_class: int | None = Field(
        None, examples=[10], ge=0, description="the class that stands for none, for guidance"
    )


class SchedulerSettings(Section):
    """The diffusion the network was trained on, and how x0 is treated; diffusers' keys and defaults."""

    num_train_timesteps: int = Field(
        1000, ge=1, le=1_000_000, description="T, the number of diffusion steps in training"
    )
    beta_start: float = Field(0.0001, ge=0, lt=1, description="the first beta")
    beta_end: float = Field(0.02, ge=0, lt=1, description="the last beta")
    beta_schedule: BetaSchedule = Field("linear", description="how beta grows from beta_start to beta_end")
    trained_betas: FloatList | None = Field(
        None, examples=[[0.0001, 0.02]], description="T betas that replace the schedule"
    )
    prediction_type: PredictionType = Field("epsilon", description="what the network predicts")
    clip_sample: bool = Field(True, description="clip each predicted x0 to +-clip_sample_range")
    clip_sample_range: float = Field(1.0, gt=0, le=1e30, description="the bound of clip_sample")
    thresholding: bool = Field(False, description="dynamic thresholding of x0 (arXiv:2205.11487); replaces clip_sample")
    dynamic_thresholding_ratio: float = Field(
        0.995, gt=0, le=1, description="the quantile of |x0| that thresholding takes"
    )
    sample_max_value: float = Field(1.0, ge=1, le=1e30, description="the largest threshold")
    timestep_spacing: TimestepSpacing = Field("leading", description="how the grid of timesteps is laid out")
    steps_offset: int = Field(0, ge=0, le=1_000_000, description="added to every timestep of a leading grid")
    set_alpha_to_one: bool = Field(
        True, description="the last step goes to alpha_bar 1, else to alpha_bar of timestep 0"
    )
    rescale_betas_zero_snr: bool = Field(False, description="rescale betas to zero terminal SNR (arXiv:2305.08891)")
    previous_timestep: PreviousTimestep = Field(
        "grid", description="a step goes to the next entry of the grid, or by diffusers' stride of T // N"
    )


class SamplingSettings(Section):
    """Which pictures, in how many steps."""

    steps: int = Field(50, ge=1, le=1_000_000, description="number of steps N asked of the grid")
    timesteps: IntList | None = Field(
        None, examples=[[999, 666, 333]], min_length=1, description="an explicit descending grid, in place of steps"
    )
    eta: float = Field(0.0, ge=0, description="0 is DDIM, deterministic; 1 has DDPM's noise")
    variance: Variance = Field("ddim", description='"large": the paper\'s sigma-hat; implies eta 1')
    use_clipped_model_output: bool = Field(False, description="derive epsilon again from the clipped x0")
    num_images: int = Field(16, ge=1, le=MAX_LENGTH, description="number of images, of the seeds from seed on")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="the first image's seed")
    seeds: SeedList | None = Field(
        None, examples=["0-63,100"], description='a list such as "0-63,100", in place of seed and num_images'
    )
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field("auto", description="images a batch")
    classes: ClassList | None = Field(
        None, examples=["0-9"], description='such as "3" or "0-9"; an image has classes[seed mod their number]'
    )
    guidance_scale: float = Field(1.0, ge=0, description="of classifier-free guidance; 1 is off")
    guidance_rescale: float = Field(
        0.0, ge=0, le=1, description="rescaling of guided predictions (arXiv:2305.08891, 3.4)"
    )


class RuntimeSettings(Section):
    """Where and how it runs."""

    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$", description="auto, cpu, cuda, cuda:N or mps"
    )
    dtype: DType = Field(
        "auto", description="of the network; auto: bfloat16 on a CUDA device that has it, else float32"
    )
    tf32: bool = Field(False, description="allow TF32 in float32 arithmetic on a GPU")
    compile: bool | Literal["auto"] = Field(
        "auto", description="run the network as compiled code, kept between runs; auto: where that pays"
    )


class OutputSettings(Section):
    """What lands on disk."""

    dir: str | None = Field(
        None, examples=["outputs/mine"], min_length=1, description="the output folder [outputs/MODEL-Nsteps-HASH]"
    )
    grid: bool = Field(True, description="write grid.png, a contact sheet of the first images")
    subdirs: bool = Field(False, description="a folder for every 1,000 seeds, named after the first")
    fsync: bool = Field(False, description="wait until each file is on the disk, so that it survives a power cut")


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


SECTIONS: dict[str, type[Section]] = {name: field.annotation for name, field in Config.model_fields.items()}
KEYS: tuple[str, ...] = tuple(f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields)
