"""A DDIM scheduler that can stand in for diffusers' in a hand-written loop or a pipeline."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ddim_cli.config.layers import merge, table_layer
from ddim_cli.config.schema import SamplingSettings, SchedulerSettings
from ddim_cli.diffusion.betas import make_betas
from ddim_cli.diffusion.coefficients import Coefficients, StepTable, final_alpha_bar, make_inverse_table, make_table
from ddim_cli.diffusion.grids import timestep_grid
from ddim_cli.diffusion.rules import check_betas
from ddim_cli.diffusion.step import X0Treatment, ddim_step
from ddim_cli.errors import ConfigError, UsageError


@dataclass
class DDIMSchedulerOutput(BaseOutput):
    """``prev_sample`` is x_prev, ``pred_original_sample`` the predicted x0; both [B, ...] in the sample's dtype."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


def _whole(value: Any) -> Any:
    """Of any type of integers an int; anything else as it is, for the settings to refuse."""
    try:
        return operator.index(value)
    except TypeError:
        return value


def _check_like(name: str, value: Any, sample: Tensor) -> None:
    """UsageError unless ``value`` is a tensor of the sample's shape: another would be broadcast."""
    if not isinstance(value, Tensor):
        what = "None" if value is None else f"a {type(value).__name__}"
        raise UsageError(f"step: {name} is {what}; it must be a tensor {list(sample.shape)}, as the sample is")
    if value.shape != sample.shape:
        raise UsageError(f"step: {name} is {list(value.shape)}, and the sample {list(sample.shape)}")


def _check_generators(generator: Any, sample: Tensor) -> None:
    """UsageError unless ``generator`` is None, a generator, or a list of one for all images or one an image."""
    if generator is None or isinstance(generator, torch.Generator):
        return
    if not isinstance(generator, list) or not all(isinstance(each, torch.Generator) for each in generator):
        raise UsageError(
            f"step: generator is a {type(generator).__name__}; it must be a torch.Generator, or a list of one an image"
        )
    if len(generator) not in (1, len(sample)):
        raise UsageError(
            f"step: {len(generator)} generators for {len(sample)} images; give one, or a list of one an image"
        )


def _sampling(values: dict[str, Any], who: str) -> SamplingSettings:
    """Validated sampling settings. Raises ConfigError, with ``who`` asked."""
    return merge([table_layer({"sampling": values}, who)]).config.sampling


class DDIMScheduler(SchedulerMixin, ConfigMixin):
    """DDIM (Song, Meng, Ermon, arXiv:2010.02502) with diffusers' constructor, methods and JSON file.

    Every constructor argument is a key of [scheduler] with its default. ``beta_schedule`` and
    ``timestep_spacing`` take diffusers' names and those that `diffusion.schedules` and
    `diffusion.spacings` have besides; beyond diffusers' keys there is ``previous_timestep`` ("grid":
    a step goes to the next entry of the grid; "diffusers": to t - T // N). Put it into a pipeline
    with ``pipe.scheduler = ...``; the constructor of DDIMPipeline would replace it with diffusers' own.

    Raises:
        ConfigError: (an ordinary exception with a sentence) for values that cannot work.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        previous_timestep: str = "grid",
    ):
        keys = {key: getattr(self.config, key) for key in SchedulerSettings.model_fields}
        if trained_betas is not None and not isinstance(trained_betas, str):
            # Of a tensor or an array too, and so that the JSON file can hold them.
            keys["trained_betas"] = [float(beta) for beta in trained_betas]
            self.register_to_config(trained_betas=keys["trained_betas"])
        keys = {key: value for key, value in keys.items() if value is not None}
        self.settings = merge([table_layer({"scheduler": keys}, "DDIMScheduler")]).config.scheduler
        check_betas(self.settings)
        self.betas = make_betas(self.settings).float()
        alpha_bars = torch.cumprod(1 - make_betas(self.settings), 0)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = alpha_bars.float()
        self.final_alpha_cumprod = final_alpha_bar(alpha_bars, set_alpha_to_one).float()
        # Of float64 alpha_bars: 1 - alpha_bar of a float32 one has lost digits where alpha_bar is near 1.
        self._signal, self._deviation = alpha_bars.sqrt().float(), (1 - alpha_bars).sqrt().float()
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self._sampling = SamplingSettings()
        self._tables: dict[tuple[Any, ...], tuple[SamplingSettings, StepTable]] = {}

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the grid: ``num_inference_steps`` by the spacing, or an explicit descending list ``timesteps``.

        Raises:
            ConfigError: for a grid that is not strictly descending inside [0, T-1].
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ConfigError("set_timesteps takes either num_inference_steps or timesteps")
        if timesteps is not None:
            asked: dict[str, Any] = {"timesteps": [_whole(t) for t in timesteps]}
        else:
            asked = {"steps": _whole(num_inference_steps)}
        self._sampling = _sampling(asked, "set_timesteps")
        self._grid = timestep_grid(self.settings, self._sampling)
        self._index: dict[Any, int] = {t: i for i, t in enumerate(self._grid)}
        self._tables.clear()
        self.num_inference_steps = len(self._grid)
        self.timesteps = torch.tensor(self._grid, dtype=torch.int64, device=device)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The network's input for x_t: in DDIM, x_t itself."""
        return sample

    def _row(
        self, timestep: int | Tensor, sample: Tensor, asked: dict[str, Any] | None = None
    ) -> tuple[SamplingSettings, Coefficients]:
        """The settings ``asked`` for and their coefficients of the step at ``timestep``; of the inverse one for None.

        A table is made once for its settings, device and dtype.
        """
        if self.num_inference_steps is None:
            raise ConfigError("call set_timesteps before stepping")
        t = timestep.item() if isinstance(timestep, Tensor) and timestep.numel() == 1 else timestep
        if not isinstance(t, Hashable) or t not in self._index:
            raise ConfigError(f"timestep {t} is not in the grid {self._grid[:3]}...; see scheduler.timesteps")
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        key = (sample.device, dtype, *(asked.items() if asked is not None else ()))
        if key not in self._tables:
            chosen = _sampling({**self._sampling.model_dump(exclude_unset=True), **(asked or {})}, "step")
            make = make_inverse_table if asked is None else make_table
            self._tables[key] = chosen, make(self.settings, chosen, self._grid, sample.device, dtype)
        chosen, table = self._tables[key]
        return chosen, table.row(self._index[t])

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        variance: str = "ddim",
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """x_t -> x_prev in the sample's dtype, computed in float32; of a float64 sample in float64, coefficients too.

        Args:
            model_output: the network's output at x_t, [B, ...].
            timestep: t, an entry of the grid.
            sample: x_t, [B, ...].
            eta: 0 for DDIM, 1 for DDPM's noise.
            use_clipped_model_output: derive epsilon again from the clipped x0.
            generator: of the noise; one, or a list of one an image.
            variance_noise: standard normal noise [B, ...] to use in place of a generator's.
            return_dict: return a DDIMSchedulerOutput, else the tuple (x_prev, x0).
            variance: "large" for noise of variance 1 - alpha_bar_t / alpha_bar_prev, none in the
                last step, with the direction term of eta 1.

        Raises:
            ConfigError: for settings that cannot work, and a timestep that is not in the grid.
            UsageError: for an output or noise of another shape than the sample's, and generators that are not one, or
                one an image.
        """
        _check_like("model_output", model_output, sample)
        asked = {"variance": variance, "use_clipped_model_output": bool(use_clipped_model_output)}
        if eta:
            # The large variance implies an eta of its own; 0 is what one is that nobody asked for.
            asked["eta"] = float(eta)
        chosen, row = self._row(timestep, sample, asked)
        state = sample if sample.dtype == torch.float64 else sample.float()
        noise = None
        if chosen.draws_noise:
            if variance_noise is not None and generator is not None:
                raise ConfigError("step takes either generator or variance_noise, not both")
            noise = variance_noise
            if noise is not None:
                _check_like("variance_noise", noise, sample)
            else:
                _check_generators(generator, sample)
                noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=state.dtype)
        treatment = X0Treatment.of(self.settings, chosen)
        x_prev, x0 = (x.to(sample.dtype) for x in ddim_step(state, model_output, row, treatment, noise))
        return DDIMSchedulerOutput(x_prev, x0) if return_dict else (x_prev, x0)

    def step_inverse(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """From the level that sampling reaches from ``timestep`` back up to level ``timestep``.

        DDIM, section 5.4. Clipping and thresholding are off. ``prev_sample`` is x at level ``timestep``, computed in
        float32, or in float64 of a float64 sample, as in `step`.

        ``model_output`` at the timestep of the level where the sample is, the next entry of the grid, makes it Euler's
        step of the ODE, and the latents approach the exact ones as 1 / N. With the output at ``timestep`` itself the
        bundled model comes back closer in few steps, from latents that are further off.

        Raises:
            ConfigError: for a timestep that is not in the grid.
            UsageError: for an output of another shape than the sample's.
        """
        _check_like("model_output", model_output, sample)
        _, row = self._row(timestep, sample)
        state = sample if sample.dtype == torch.float64 else sample.float()
        x_t, x0 = (x.to(sample.dtype) for x in ddim_step(state, model_output, row, X0Treatment()))
        return DDIMSchedulerOutput(x_t, x0) if return_dict else (x_t, x0)

    def _levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), shaped to multiply ``like``."""
        self._signal, self._deviation = self._signal.to(like.device), self._deviation.to(like.device)
        shape, index = (-1, *[1] * (like.ndim - 1)), timesteps.to(like.device)
        signal, deviation = (level[index].view(shape).to(like.dtype) for level in (self._signal, self._deviation))
        return signal, deviation

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x0 -> x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise; timesteps int64 [B] or [1]."""
        signal, deviation = self._levels(timesteps, original_samples)
        return signal * original_samples + deviation * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x0 (Salimans and Ho, arXiv:2202.00512)."""
        signal, deviation = self._levels(timesteps, sample)
        return signal * noise - deviation * sample

    def __len__(self) -> int:
        return self.config.num_train_timesteps
