"""What `ddim` is measured against: diffusers on the same weights, as its documentation shows it and at its best."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from ddim_cli.diffusion.coefficients import previous_timesteps
from ddim_cli.diffusion.schedules import SCHEDULES
from ddim_cli.diffusion.spacings import SPACINGS
from ddim_cli.errors import UsageError
from ddim_cli.models.describe import ModelDescription
from ddim_cli.models.stored import read_weights
from ddim_cli.outputs.picture import to_image, to_pixels
from ddim_cli.sampling.compiled import compiler
from ddim_cli.sampling.resolve import Run

if TYPE_CHECKING:
    # Slow to import, and of no use where nothing is compared.
    from diffusers import DDIMScheduler, UNet2DModel

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


def describe_baseline(name: str, dtype: torch.dtype) -> str:
    """What one of `BASELINES` is, in this dtype."""
    return _IN_BFLOAT16.get(name, BASELINES[name]) if dtype == torch.bfloat16 else BASELINES[name]


def check_comparable(run: Run, names: Sequence[str]) -> None:
    """Raise UsageError for what diffusers' pipeline does not have, or a compile that cannot be."""
    config, [name, *_] = run.config, names
    schedule, spacing = config.scheduler.beta_schedule, config.scheduler.timestep_spacing
    unknown = [
        text
        for text, there in (
            ("classes", config.sampling.classes is not None),
            ('variance = "large"', config.sampling.variance == "large"),
            ("an explicit list of timesteps", config.sampling.timesteps is not None),
            (f"the schedule {schedule}", not SCHEDULES[schedule].in_diffusers),
            (f"the spacing {spacing}", not SPACINGS[spacing].in_diffusers),
        )
        if there
    ]
    if unknown:
        raise UsageError(f"--against {name}: diffusers' DDIMPipeline does not have {' or '.join(unknown)}")
    if "diffusers+" in names and compiler() is None:
        raise UsageError("--against diffusers+ compiles, which needs a C++ compiler, and none was found")


def diffusers_unet(model: ModelDescription, device: torch.device, dtype: torch.dtype) -> UNet2DModel:
    """diffusers' own network with the model's weights, by none of our ways of building or running it."""
    from diffusers import UNet2DModel

    config = {k: v for k, v in model.network.items() if not k.startswith("_")}
    unet = UNet2DModel.from_config({**config, "out_channels": model.channels})
    weights = {name: tensor.to(device, dtype) for name, tensor in read_weights(model)}
    unet.load_state_dict(weights, assign=True)
    return unet.to(device).eval()


def diffusers_scheduler(run: Run) -> DDIMScheduler:
    """diffusers' scheduler with the run's settings. Its stride is its own: `previous_timestep` is not among them."""
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(run.config.scheduler.model_dump(mode="json", exclude={"previous_timestep"}))


def stride_note(run: Run) -> str | None:
    """Where diffusers' scheduler steps to other timesteps than this run: that it does, and what that means."""
    settings, sampling = run.config.scheduler, run.config.sampling
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


class Contestant:
    """Someone who makes pictures of seeds: those below, and `bench.Ours`."""

    def images(self, generators: list[torch.Generator]) -> list[Image.Image]:
        """A batch, a picture a generator."""
        raise NotImplementedError

    def batches(self, seeds: Sequence[int], batch_size: int, folder: Path | None) -> Iterator[list[np.ndarray]]:
        """Yield each batch's pictures, uint8 [H, W, C], once they are saved in ``folder`` (None: not saved)."""
        for start in range(0, len(seeds), batch_size):
            part = seeds[start : start + batch_size]
            images = self.images([torch.Generator("cpu").manual_seed(seed) for seed in part])
            if folder is not None:
                for seed, image in zip(part, images, strict=True):
                    image.save(folder / f"{seed:06d}.png")
            yield [to_pixels(image) for image in images]

    def close(self) -> None:
        pass


class Diffusers(Contestant):
    """``A``: the pipeline as documented."""

    def __init__(self, run: Run, device: torch.device, dtype: torch.dtype):
        from diffusers import DDIMPipeline

        self._settings = run.config.sampling
        self._pipeline = DDIMPipeline(diffusers_unet(run.model, device, dtype), diffusers_scheduler(run)).to(device)
        # Its bar is drawn, as documented, but where it spoils no table of ours.
        self._screen = open(os.devnull, "w")  # noqa: SIM115
        self._pipeline.set_progress_bar_config(file=self._screen)

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


class DiffusersLoop(Contestant):
    """``A`` in bfloat16, of which DDIMPipeline cannot make pictures: the loop that diffusers' documentation shows."""

    def __init__(self, run: Run, device: torch.device, dtype: torch.dtype):
        self._settings, self._device, self._dtype = run.config.sampling, device, dtype
        self._unet = diffusers_unet(run.model, device, dtype)
        self._scheduler = diffusers_scheduler(run)
        self._shape = run.model.shape

    def _noise(self, generators: Sequence[torch.Generator]) -> torch.Tensor:
        return torch.stack([torch.randn(self._shape, generator=g, dtype=self._dtype) for g in generators])

    def _step(
        self, output: torch.Tensor, t: torch.Tensor, x: torch.Tensor, generators: list[torch.Generator]
    ) -> torch.Tensor:
        settings = self._settings
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
        self._scheduler.set_timesteps(self._settings.steps)
        return [to_image(pixels) for pixels in self._denoise(generators)]


class DiffusersPlus(DiffusersLoop):
    """``A+``: diffusers' network and scheduler with every switch that its speed guide recommends."""

    def __init__(self, run: Run, device: torch.device, dtype: torch.dtype):
        super().__init__(run, device, dtype)
        # max-autotune tries GPU kernels, and uses CUDA graphs; on a CPU it is minutes for nothing.
        mode = "max-autotune" if device.type == "cuda" else None
        unet = self._unet.to(memory_format=torch.channels_last)
        self._unet = torch.compile(unet, fullgraph=True, dynamic=False, mode=mode)

    def _denoise(self, generators: list[torch.Generator]) -> np.ndarray:
        x = self._noise(generators).to(self._device, memory_format=torch.channels_last)
        # The scheduler reads its tables on the host, by timesteps that are there too: so no step waits for the device.
        for t, on_device in zip(self._scheduler.timesteps, self._scheduler.timesteps.to(self._device), strict=True):
            x = self._step(self._unet(x, on_device, return_dict=False)[0], t, x, generators)
        pixels = (x / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def make_baseline(name: str, run: Run, device: torch.device, dtype: torch.dtype) -> Contestant:
    if name == "diffusers+":
        return DiffusersPlus(run, device, dtype)
    return (DiffusersLoop if dtype == torch.bfloat16 else Diffusers)(run, device, dtype)
