"""The mathematics of DDIM as pure functions: betas, timestep grids, coefficients, thresholding, the step.

No files, no command line, no diffusers. `grids` and `rules` need no torch, so that settings can be
judged before it is loaded.

Notation: t counts from 0 to T-1; alpha_bar_t = prod_{s<=t} (1 - beta_s), which the DDIM paper
calls alpha_t; x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) epsilon.
"""
