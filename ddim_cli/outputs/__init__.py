"""What lands on disk: PNG, sidecar, run manifest, contact sheet; every file whole or absent."""
