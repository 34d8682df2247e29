"""Where a network comes from: the models that ship in the package, and diffusers directories."""
