"""What `ddim` is measured against: diffusers on the same weights, as its documentation shows it and at its best."""

from __future__ import annotations

import contextlib
import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ddim_cli.diffusion.coefficients import previous_timesteps
from ddim_cli.diffusion.schedules import SCHEDULES
from ddim_cli.diffusion.solvers import solver_of
from ddim_cli.diffusion.spacings import SPACINGS
from ddim_cli.errors import UsageError
from ddim_cli.evaluation.gauges import NetworkClock
from ddim_cli.models.decoders import load_autoencoder
from ddim_cli.models.describe import ModelDescription
from ddim_cli.models.load import load_described
from ddim_cli.models.stored import read_weights
from ddim_cli.models.text import load_text_encoder, load_tokenizer
from ddim_cli.outputs.picture import to_image, to_pixels
from ddim_cli.sampling.compiled import compiler
from ddim_cli.sampling.resolve import Run

if TYPE_CHECKING:
    # Slow to import, and of no use where nothing is compared.
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DModel

# The name of each as --against takes it, and what it is.
BASELINES = {
    "diffusers": "DDIMPipeline as its documentation shows it, its PNGs saved by Pillow",
    "diffusers+": "UNet and scheduler with channels_last, torch.compile, SDPA, no progress bar and uint8 on the device",
}
# What takes the place of a baseline in bfloat16: there DDIMPipeline fails, as it hands a bfloat16 tensor to NumPy.
_IN_BFLOAT16 = {
    "diffusers": "the loop over UNet and scheduler of its documentation, raised to float32 at the end (DDIMPipeline "
    "makes no pictures in bfloat16), its PNGs saved by Pillow",
}


# And of order 2 and 3, for which DDIMPipeline has no room.
_OF_HIGHER_ORDER = {
    "diffusers": "the loop over UNet and DPMSolverMultistepScheduler of its documentation (DDIMPipeline takes DDIM "
    "alone), its PNGs saved by Pillow",
}


# Of a latent model; PIPELINE stands for its name.
_OF_LATENTS = {
    "diffusers": "PIPELINE as its documentation shows it, without its progress bar, its PNGs saved by Pillow",
    "diffusers+": "PIPELINE with channels_last and torch.compile of its UNet, SDPA, and no progress bar",
}


def describe_baseline(name: str, dtype: torch.dtype, pipeline: str = "DDIMPipeline", order: int = 1) -> str:
    """What one of `BASELINES` is, in this dtype, where diffusers runs the model by this pipeline."""
    if pipeline != "DDIMPipeline":
        with_solver = "" if order == 1 else " with DPMSolverMultistepScheduler"
        return _OF_LATENTS[name].replace("PIPELINE", f"{pipeline}{with_solver}")
    if order > 1:
        return _OF_HIGHER_ORDER.get(name, BASELINES[name])
    return _IN_BFLOAT16.get(name, BASELINES[name]) if dtype == torch.bfloat16 else BASELINES[name]


def pipeline_name(model: ModelDescription) -> str:
    """Diffusers' pipeline for a model."""
    if model.latents is None:
        return "DDIMPipeline"
    return "StableDiffusionPipeline" if model.takes_text else "LDMPipeline"


def check_comparable(run: Run, names: Sequence[str], dtype: torch.dtype = torch.float32) -> None:
    """Raise UsageError for what diffusers' pipeline does not have, or a compile that cannot be."""
    config, [name, *_] = run.config, names
    schedule, spacing = config.scheduler.beta_schedule, config.scheduler.timestep_spacing
    pipeline, (height, width) = pipeline_name(run.model), run.model.size
    order, eta = config.sampling.order, config.sampling.eta
    unknown = [
        text
        for text, there in (
            ("classes", config.sampling.classes is not None),
            ('variance = "large"', config.sampling.variance == "large"),
            ("an explicit list of timesteps", config.sampling.timesteps is not None),
            (f"the schedule {schedule}", not SCHEDULES[schedule].in_diffusers),
            (f"the spacing {spacing}", not SPACINGS[spacing].in_diffusers),
            ("use_clipped_model_output", run.model.latents is not None and config.sampling.use_clipped_model_output),
            ("a guidance scale below 1", config.sampling.guidance_scale < 1),
            ("pictures that are not square", pipeline == "LDMPipeline" and height != width),
            # It draws that of the steps from no generator.
            ("noise of a seed, which eta above 0 needs", pipeline == "LDMPipeline" and eta > 0),
            (f"an eta other than 0 and 1 with order {order}", order > 1 and eta not in (0, 1)),
            # It gives NaN there.
            (
                "a step of order 3 from timestep 0 to its own level",
                order == 3 and not config.scheduler.set_alpha_to_one and run.timesteps[-1] == 0,
            ),
            # It takes the scheduler's own timesteps, which are others.
            (f"the timesteps of order {order}", pipeline == "LDMPipeline" and order > 1),
            ("bfloat16", pipeline == "LDMPipeline" and dtype == torch.bfloat16),
        )
        if there
    ]
    if unknown:
        raise UsageError(f"--against {name}: diffusers' {pipeline} does not have {' or '.join(unknown)}")
    if "diffusers+" in names and compiler() is None:
        raise UsageError("--against diffusers+ compiles, which needs a C++ compiler, and none was found")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers says on import of image processors, which nothing here uses."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def diffusers_pipeline(run: Run, device: torch.device, dtype: torch.dtype) -> Any:
    """Diffusers' pipeline of a latent model with all of the model's parts in ``dtype``, as from_pretrained gives it."""
    with _quiet():
        from diffusers import LDMPipeline, StableDiffusionPipeline

    model, latents = run.model, run.model.latents
    assert latents is not None
    unet = load_described(model, device, dtype).network
    autoencoder = load_autoencoder(latents, device, dtype, torch.contiguous_format)
    autoencoder.register_to_config(scaling_factor=latents.scale)
    if latents.text is None:
        return LDMPipeline(autoencoder, unet, diffusers_scheduler(run))
    return StableDiffusionPipeline(
        unet=unet,
        vae=autoencoder,
        text_encoder=torch.nn.Module.to(load_text_encoder(latents.text.encoder, device), dtype),
        tokenizer=load_tokenizer(latents.text.tokenizer),
        scheduler=diffusers_scheduler(run),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def diffusers_unet(model: ModelDescription, device: torch.device, dtype: torch.dtype) -> UNet2DModel:
    """diffusers' own network with the model's weights, by none of our ways of building or running it."""
    from diffusers import UNet2DModel

    config = {k: v for k, v in model.network.items() if not k.startswith("_")}
    unet = UNet2DModel.from_config({**config, "out_channels": model.channels})
    weights = {name: tensor.to(device, dtype) for name, tensor in read_weights(model)}
    unet.load_state_dict(weights, assign=True)
    return unet.to(device).eval()


def diffusers_scheduler(run: Run) -> DDIMScheduler | DPMSolverMultistepScheduler:
    """diffusers' scheduler with the run's settings. Its stride is its own: `previous_timestep` is not among them."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    settings, sampling = (
        run.config.scheduler.model_dump(mode="json", exclude={"previous_timestep"}),
        run.config.sampling,
    )
    if sampling.order == 1:
        return DDIMScheduler.from_config(settings)
    known = inspect.signature(DPMSolverMultistepScheduler.__init__).parameters
    return DPMSolverMultistepScheduler(
        **{key: value for key, value in settings.items() if key in known},
        solver_order=sampling.order,
        algorithm_type="sde-dpmsolver++" if sampling.draws_noise else "dpmsolver++",
        final_sigmas_type="zero" if settings["set_alpha_to_one"] else "sigma_min",
    )


def step_note(run: Run) -> str | None:
    """Where diffusers' scheduler steps otherwise than this run: what it does, and what that means."""
    settings, sampling = run.config.scheduler, run.config.sampling
    if sampling.order > 1:
        return _multistep_note(run)
    theirs = settings.model_copy(update={"previous_timestep": "diffusers"})
    if previous_timesteps(run.timesteps, theirs, sampling.steps) == previous_timesteps(
        run.timesteps, settings, sampling.steps
    ):
        return None
    stride = settings.num_train_timesteps // sampling.steps
    return (
        f"diffusers steps from t to t - {stride}, which is not the next timestep of this {settings.timestep_spacing} "
        "grid (its issues 9261, 11347 and 12633), so its pictures differ; ours do the same with "
        "--set scheduler.previous_timestep=diffusers"
    )


def _multistep_note(run: Run) -> str | None:
    settings, sampling = run.config.scheduler, run.config.sampling
    orders = solver_of(sampling).table(settings, sampling, run.timesteps).orders
    reasons = [
        text
        for text, holds in (
            ("does not clip x0, as ours does not with --no-clip-sample", settings.clip_sample),
            (
                f"weights the second difference of order 3 {'with another sign' if sampling.eta else 'by half'}",
                sampling.order == 3,
            ),
            # But for the ends, which it lowers as well.
            ("takes no step of lower order where one is long", 1 in orders[1:-1]),
            ("begins zero terminal SNR at an alpha_bar of 2^-24", settings.rescale_betas_zero_snr),
        )
        if holds
    ]
    if not reasons:
        return None
    return f"diffusers' DPMSolverMultistepScheduler {', and '.join(reasons)}, so its pictures differ"


class Contestant(ABC):
    """Someone who makes pictures of seeds: those below, and `bench.Ours`."""

    @abstractmethod
    def batches(self, seeds: Sequence[int], batch_size: int, folder: Path | None) -> Iterator[list[np.ndarray]]:
        """Yield each batch's pictures, uint8 [H, W, C], once they are saved in ``folder`` (None: not saved)."""

    def close(self) -> None:  # noqa: B027  # not all have something to close
        """Give back what is held."""


class Baseline(Contestant):
    """Diffusers, in one way or another. ``clock`` adds up the time of its network's calls, on a CPU."""

    clock: NetworkClock | None = None

    @abstractmethod
    def images(self, generators: list[torch.Generator]) -> list[Image.Image]:
        """A batch, a picture a generator."""

    def batches(self, seeds: Sequence[int], batch_size: int, folder: Path | None) -> Iterator[list[np.ndarray]]:
        if self.clock is not None:
            self.clock.seconds = 0.0
        for start in range(0, len(seeds), batch_size):
            part = seeds[start : start + batch_size]
            images = self.images([torch.Generator("cpu").manual_seed(seed) for seed in part])
            if folder is not None:
                for seed, image in zip(part, images, strict=True):
                    image.save(folder / f"{seed:06d}.png")
            yield [to_pixels(image) for image in images]

    def _watch(self, network: Any, device: torch.device) -> None:
        """Time the calls of a network from now on. On a GPU they return before they are done."""
        if device.type == "cpu":
            self.clock = network.forward = NetworkClock(network.forward)


class Diffusers(Baseline):
    """``A``: the pipeline as documented."""

    def __init__(self, run: Run, device: torch.device, dtype: torch.dtype):
        from diffusers import DDIMPipeline

        self._settings = run.config.sampling
        self._pipeline = DDIMPipeline(diffusers_unet(run.model, device, dtype), diffusers_scheduler(run)).to(device)
        # Its bar is drawn, as documented, but where it spoils no table of ours.
        self._screen = open(os.devnull, "w")  # noqa: SIM115
        self._pipeline.set_progress_bar_config(file=self._screen)
        self._watch(self._pipeline.unet, device)

    def images(self, generators: list[torch.Generator]) -> list[Image.Image]:
        return self._pipeline(
            batch_size=len(generators),
            generator=generators,
            eta=self._settings.eta,
            num_inference_steps=self._settings.steps,
            use_clipped_model_output=self._settings.use_clipped_model_output,
        ).images

    def close(self) -> None:
        self._screen.close()


class DiffusersLoop(Baseline):
    """``A`` where DDIMPipeline makes no pictures, in bfloat16 and of order 2 and 3: the loop of its documentation."""

    def __init__(self, run: Run, device: torch.device, dtype: torch.dtype):
        self._settings, self._device, self._dtype = run.config.sampling, device, dtype
        self._unet = self._prepared(diffusers_unet(run.model, device, dtype))
        self._watch(self._unet, device)
        self._scheduler = diffusers_scheduler(run)
        self._shape, self._timesteps = run.model.shape, list(run.timesteps)

    def _prepared(self, unet: Any) -> Any:
        return unet

    def _noise(self, generators: Sequence[torch.Generator]) -> torch.Tensor:
        return torch.stack([torch.randn(self._shape, generator=g, dtype=self._dtype) for g in generators])

    def _step(
        self, output: torch.Tensor, t: torch.Tensor, x: torch.Tensor, generators: list[torch.Generator]
    ) -> torch.Tensor:
        settings, options = self._settings, dict[str, Any]()
        if settings.order == 1:
            options = {"eta": settings.eta, "use_clipped_model_output": settings.use_clipped_model_output}
        return self._scheduler.step(output, t, x, generator=generators, **options).prev_sample

    def _denoise(self, generators: list[torch.Generator]) -> np.ndarray:
        x = self._noise(generators).to(self._device)
        for t in self._scheduler.timesteps:
            x = self._step(self._unet(x, t).sample, t, x, generators)
        # NumPy has no bfloat16.
        pixels = (x.float() / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()
        return (pixels * 255).round().astype(np.uint8)

    @torch.no_grad()
    def images(self, generators: list[torch.Generator]) -> list[Image.Image]:
        if self._settings.order == 1:
            self._scheduler.set_timesteps(self._settings.steps)
        else:
            self._scheduler.set_timesteps(timesteps=self._timesteps)
        return [to_image(pixels) for pixels in self._denoise(generators)]


class DiffusersPlus(DiffusersLoop):
    """``A+``: diffusers' network and scheduler with every switch that its speed guide recommends."""

    def _prepared(self, unet: Any) -> Any:
        return compiled_unet(unet, self._device)

    def _denoise(self, generators: list[torch.Generator]) -> np.ndarray:
        x = self._noise(generators).to(self._device, memory_format=torch.channels_last)
        # The scheduler reads its tables on the host, by timesteps that are there too: so no step waits for the device.
        for t, on_device in zip(self._scheduler.timesteps, self._scheduler.timesteps.to(self._device), strict=True):
            x = self._step(self._unet(x, on_device, return_dict=False)[0], t, x, generators)
        pixels = (x / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def compiled_unet(unet: Any, device: torch.device) -> Any:
    """A network as diffusers' speed guide has it."""
    # max-autotune tries GPU kernels, and uses CUDA graphs; on a CPU it is minutes for nothing.
    mode = "max-autotune" if device.type == "cuda" else None
    return torch.compile(unet.to(memory_format=torch.channels_last), fullgraph=True, dynamic=False, mode=mode)


class LatentPipeline(Baseline):
    """The pipeline of a latent model, without its progress bar; ``plus``, its network compiled and channels-last."""

    def __init__(self, run: Run, device: torch.device, dtype: torch.dtype, plus: bool):
        self._run = run
        self._pipeline = diffusers_pipeline(run, device, dtype)
        self._pipeline.set_progress_bar_config(disable=True)
        if plus:
            self._pipeline.unet = compiled_unet(self._pipeline.unet, device)
            decoder = self._pipeline.vae if run.model.takes_text else self._pipeline.vqvae
            decoder.to(memory_format=torch.channels_last)
        self._watch(self._pipeline.unet, device)

    def images(self, generators: list[torch.Generator]) -> list[Image.Image]:
        settings, count = self._run.config.sampling, len(generators)
        common = {"generator": generators, "eta": settings.eta, "num_inference_steps": settings.steps}
        if not self._run.model.takes_text:
            return self._pipeline(batch_size=count, **common).images
        height, width = self._run.model.size
        if settings.order > 1:
            common = {**common, "num_inference_steps": None, "timesteps": list(self._run.timesteps)}
        return self._pipeline(
            prompt=[settings.prompt] * count,
            negative_prompt=[settings.negative_prompt or ""] * count,
            guidance_scale=settings.guidance_scale,
            guidance_rescale=settings.guidance_rescale,
            height=height,
            width=width,
            output_type="pil",
            **common,
        ).images

    def close(self) -> None:
        del self._pipeline


def make_baseline(name: str, run: Run, device: torch.device, dtype: torch.dtype) -> Baseline:
    if run.model.latents is not None:
        return LatentPipeline(run, device, dtype, name == "diffusers+")
    if name == "diffusers+":
        return DiffusersPlus(run, device, dtype)
    loops = dtype == torch.bfloat16 or run.config.sampling.order > 1
    return (DiffusersLoop if loops else Diffusers)(run, device, dtype)
