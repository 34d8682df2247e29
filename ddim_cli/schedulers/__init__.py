"""DDIMScheduler: the mathematics of `diffusion` behind diffusers' scheduler interface."""
