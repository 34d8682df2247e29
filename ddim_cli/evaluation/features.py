"""Feature extractors: they turn pictures into the vectors whose distance is measured.

`open_extractor` knows three: Inception as torchmetrics has it, the bundled digit classifier, and a network of the
user's own in TorchScript or as torch.export saved it.
"""

from __future__ import annotations

import importlib
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddim_cli.errors import ModelError, RunError, UsageError, first_line
from ddim_cli.evaluation import digits
from ddim_cli.models.hashing import file_sha256
from ddim_cli.models.weights import read_pickle

BUNDLED, BUNDLED_NAME = "mnist", "mnist-digits"
# torch-fidelity's name for its weights ends in the first digits of their sha256. Only theirs make a FID.
STANDARD_WEIGHTS = "6726825d"
# How the values 0..255 of a picture are given to a network of the user's own.
INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "unit": lambda x: x.float() / 255,
    "signed": lambda x: x.float() / 127.5 - 1,
    "bytes": lambda x: x,
}


@dataclass(frozen=True)
class Extractor:
    """``extract`` turns uint8 [N, C, H, W], C = 1 or 3, into features, float32 [N, D], on the same device.

    ``sha256`` is of its file; ``standard`` is True for the Inception of FID alone; ``conversion`` says in words what
    is done to a picture of a shape (C, H, W), None for nothing worth saying.
    """

    name: str
    sha256: str | None
    extract: Callable[[Tensor], Tensor]
    standard: bool = False
    conversion: Callable[[tuple[int, int, int]], str | None] = lambda shape: None

    @property
    def metric(self) -> str:
        """What its distance may be called."""
        return "FID" if self.standard else "Frechet distance"


def open_extractor(
    name: str | None, device: torch.device, inception: Path | None = None, values: str = "unit"
) -> Extractor:
    """The extractor of this name, on ``device``.

    Args:
        name: None for Inception, ``"mnist"`` for the bundled classifier, else a file of TorchScript or torch.export.
        inception: Inception's weights, where they are not to be fetched.
        values: of a user's own network, how it takes a picture's values; a key of `INPUTS`.

    Raises:
        UsageError: for one that is not there or cannot be loaded.
        RunError: if Inception's weights cannot be fetched.
    """
    if name is None:
        return _inception(device, inception)
    return _digits(device) if name == BUNDLED else _users_own(Path(name), device, values)


def _rgb(x: Tensor) -> Tensor:
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x


def _digits(device: torch.device) -> Extractor:
    network = digits.load_classifier().to(device)

    def extract(x: Tensor) -> Tensor:
        return network.features(_as_digits(x).to(torch.float32) / 127.5 - 1)

    return Extractor(BUNDLED_NAME, file_sha256(digits.WEIGHTS), extract, conversion=_digit_conversion)


def _as_digits(x: Tensor) -> Tensor:
    """uint8 [N, C, H, W] -> [N, 1, 32, 32] in 0..255: 28 x 28 is padded as in training, another size is resized."""
    if x.shape[1] == 3:
        # ITU-R 601, as Pillow's mode L.
        x = torch.einsum("nchw,c->nhw", x.float(), x.new_tensor([0.299, 0.587, 0.114], dtype=torch.float32))
        x = x.round().unsqueeze(1)
    if x.shape[2:] == (28, 28):
        return nn.functional.pad(x, (2, 2, 2, 2))
    if x.shape[2:] != (digits.SIZE, digits.SIZE):
        return nn.functional.interpolate(x.float(), (digits.SIZE, digits.SIZE), mode="bilinear", antialias=True)
    return x


def _digit_conversion(shape: tuple[int, int, int]) -> str | None:
    channels, height, width = shape
    size = f"{width} x {height}"
    done = [f"resized from {size} to 32 x 32"] if (height, width) not in ((28, 28), (32, 32)) else []
    done += ["made grey"] if channels == 3 else []
    return f"pictures were {' and '.join(done)}" if done else None


def _inception(device: torch.device, weights: Path | None) -> Extractor:
    if weights is not None and not weights.is_file():
        raise UsageError(f"--inception {weights}: there is no such file")
    if weights is not None:
        # torch-fidelity would run what is in a pickle.
        read_pickle(weights)
    network_class, url = _inception_class()
    try:
        # The original Inception resizes without antialiasing, and so do all published FIDs; torchmetrics can do
        # either.
        network = network_class(
            name="inception-v3-compat",
            features_list=["2048"],
            feature_extractor_weights_path=None if weights is None else str(weights),
            antialias=False,
        )
    except OSError as error:
        raise RunError(
            f"Inception's weights could not be fetched ({error}); get {url} where there is a network, and give the "
            "file with --inception FILE"
        ) from None
    except RuntimeError as error:
        raise ModelError(
            f"--inception {weights}: not the weights of this Inception: {first_line(error, 200)}"
        ) from None
    file = weights or Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    sha256 = file_sha256(file) if file.is_file() else None
    standard = sha256 is not None and sha256.startswith(STANDARD_WEIGHTS)
    name = "Inception (torch-fidelity)" if standard else f"Inception with the weights {file.name}"
    network = network.to(device)
    return Extractor(name, sha256, lambda x: network(_rgb(x).contiguous()), standard)


def _inception_class() -> tuple[type, str]:
    """torchmetrics' Inception, and the address of its weights. Raises UsageError where it cannot be imported."""
    others = "or choose other features: --extractor FILE, or --extractor mnist for digits"
    try:
        from_fidelity = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        from_metrics = importlib.import_module("torchmetrics.image.fid")
    except Exception as error:
        # Where torchvision was built for another torch, importing it fails with errors of many kinds.
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing in ("torch_fidelity", "torchmetrics"):
            raise UsageError(
                f"FID needs {missing.replace('_', '-')}, which is not installed: pip install 'ddim-cli[eval]', {others}"
            ) from None
        build = "no CUDA" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
        raise UsageError(
            f"FID needs torch-fidelity, which cannot be imported: {first_line(error, 200)}. It needs a torchvision of "
            f"the same build as torch (here {torch.__version__}, {build}): install both from the same package index, "
            f"{others}"
        ) from None
    return from_metrics.NoTrainInceptionV3, from_fidelity.URL_INCEPTION_V3


def _users_own(path: Path, device: torch.device, values: str) -> Extractor:
    if values not in INPUTS:
        raise UsageError(f"--extractor-input {values}: it takes one of {', '.join(INPUTS)}")
    if not path.is_file():
        raise UsageError(f"--extractor {path}: there is no such file; the bundled extractor is {BUNDLED}")
    kind = _kind(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = (_load_script if kind == "TorchScript" else _load_exported)(path, device)
    except Exception as error:
        # Loading runs what is in the file, and that may fail in any way.
        raise UsageError(f"--extractor {path}: cannot be loaded as {kind}: {first_line(error, 200)}") from None
    as_input = INPUTS[values]
    # Whether it wants three channels of grey pictures, once that is known.
    wants_rgb: bool | None = network.wants_rgb

    def extract(x: Tensor) -> Tensor:
        nonlocal wants_rgb
        grey = x.shape[1] == 1
        for rgb in [wants_rgb] if wants_rgb is not None or not grey else [False, True]:
            try:
                features = network(as_input(_rgb(x) if rgb else x))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                if grey and rgb is False and wants_rgb is None:
                    continue
                raise UsageError(
                    f"--extractor {path}: failed on a batch of pictures {list(x.shape)}, given as {values} (see "
                    f"--extractor-input): {_reason(error)}"
                ) from None
            if grey:
                wants_rgb = rgb
            return _checked(features, len(x), path)
        raise AssertionError("not reached")

    return Extractor(path.name, file_sha256(path), extract)


def _checked(features: Any, count: int, path: Path) -> Tensor:
    """``features`` as float32 [N, D]. Raises UsageError for anything that is not [N, D] or [N, D, 1, 1]."""
    if isinstance(features, Tensor) and features.ndim == 4 and features.shape[2:] == (1, 1):
        features = features.flatten(1)
    if (
        not isinstance(features, Tensor)
        or features.ndim != 2
        or len(features) != count
        or not features.is_floating_point()
    ):
        what = f"{features.dtype} {list(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise UsageError(f"--extractor {path}: gave {what} for {count} pictures; expected floats [N, D]")
    return features.float()


def _reason(error: BaseException) -> str:
    """The last line of what TorchScript says, whose first ones tell where; the first of another error."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return (lines[-1] if "TorchScript" in lines[0] or "TorchScript" in str(error) else lines[0])[:300]


def _kind(path: Path) -> str:
    """``"TorchScript"`` or ``"an exported program"``. Raises UsageError for a file that is neither."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        names = []
    if any("/code/" in name for name in names):
        return "TorchScript"
    if path.suffix == ".pt2" or any("exported_program" in name or "archive_format" in name for name in names):
        return "an exported program"
    raise UsageError(
        f"--extractor {path}: is neither TorchScript nor a program of torch.export. Weights alone do not say how to "
        "compute features: save the network with torch.jit.script(network).save(FILE), or torch.export.save"
    )


class _Script:
    """A TorchScript module. Where it takes ``return_features``, as NVIDIA's metric networks do, that is asked for."""

    wants_rgb: bool | None = None

    def __init__(self, module: torch.jit.ScriptModule):
        self._module = module
        names = {argument.name for argument in module.forward.schema.arguments}  # type: ignore[attr-defined]  # of a script it is no function
        self._options = {"return_features": True} if "return_features" in names else {}

    def __call__(self, x: Tensor) -> Any:
        return self._module(x, **self._options)


def _load_script(path: Path, device: torch.device) -> _Script:
    return _Script(torch.jit.load(path, map_location=device).eval())


class _Exported:
    """A program of torch.export; where its batch size is fixed, it gets batches of that size."""

    def __init__(self, program: torch.export.ExportedProgram, device: torch.device):
        inputs = set(program.graph_signature.user_inputs)
        shapes = [n.meta["val"].shape for n in program.graph.nodes if n.op == "placeholder" and n.name in inputs]
        if len(shapes) != 1 or len(shapes[0]) != 4:
            raise ValueError("it takes other inputs than one batch of pictures [N, C, H, W]")
        batch, channels = shapes[0][:2]
        self._batch = batch if isinstance(batch, int) else None
        self.wants_rgb = channels == 3 if isinstance(channels, int) else None
        self._module = program.module().to(device)

    def __call__(self, x: Tensor) -> Any:
        if self._batch is None:
            return self._module(x)
        size = self._batch
        # The last one is filled up by repeating its last picture.
        parts = [torch.cat([p, p[-1:].expand(size - len(p), -1, -1, -1)]) for p in x.split(size)]
        return torch.cat([self._module(part) for part in parts])[: len(x)]


def _load_exported(path: Path, device: torch.device) -> _Exported:
    return _Exported(torch.export.load(path), device)
