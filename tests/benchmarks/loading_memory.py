"""Peak host memory of loading a model, over the interpreter's own, as a multiple of the weights' size.

    python tests/benchmarks/loading_memory.py

Makes a random network of about 400 MB, and loads it in processes of their own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

# VmHWM is of this process alone; getrusage's peak is inherited from the parent.
MEASURE = """
import re, sys, torch
from ddim_cli.models.load import load_model
source, dtype = sys.argv[1:]
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
base = peak()
model = load_model(source, dtype=getattr(torch, dtype))
print(base, peak())
"""


def peak_bytes(source: Path, dtype: str) -> int:
    """How far the peak rises above what the imports alone took."""
    command = [sys.executable, "-c", MEASURE, str(source), dtype]
    base, peak = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    return (peak - base) * 1024


def main() -> None:
    import torch
    from diffusers import UNet2DModel

    with tempfile.TemporaryDirectory() as folder:
        network = UNet2DModel(sample_size=32, block_out_channels=(256, 512, 512, 512))
        size = sum(p.numel() for p in network.parameters()) * 4
        safetensors, pickle = Path(folder) / "safetensors", Path(folder) / "bin"
        network.save_pretrained(safetensors)
        pickle.mkdir()
        (pickle / "config.json").write_bytes((safetensors / "config.json").read_bytes())
        torch.save(network.state_dict(), pickle / "diffusion_pytorch_model.bin")
        print(f"weights: {size / 1e6:.0f} MB in float32")
        for source in (safetensors, pickle):
            for dtype, share in (("float32", 1.0), ("bfloat16", 0.5)):
                ratio = peak_bytes(source, dtype) / (size * share)
                print(f"{source.name:<12} loaded in {dtype:<9} peak {ratio:.2f} x the weights' size there")


if __name__ == "__main__":
    main()
