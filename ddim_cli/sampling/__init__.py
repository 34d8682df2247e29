"""Runs it: resolve, plan, noise, the denoising loop, precision, and the way of one run from settings to files.

`resolve` and `plan` need no torch.
"""
