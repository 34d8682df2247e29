"""TOML files, --set and flags -> validated, frozen settings. Never imports torch."""
