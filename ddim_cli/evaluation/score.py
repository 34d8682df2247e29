"""How far pictures are from a reference: Frechet and kernel distance in the features of an extractor.

judge = Judge.open("mnist")
judge.score(paths).value
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddim_cli.errors import RunError, UsageError
from ddim_cli.evaluation import digits
from ddim_cli.evaluation.features import BUNDLED, Extractor, open_extractor
from ddim_cli.evaluation.frechet import Gaussian, KernelDistance, Moments, frechet_distance, kernel_distance
from ddim_cli.evaluation.pictures import PictureFiles, Pictures, open_pictures
from ddim_cli.evaluation.reference import holds, read_statistics, spread_out, write_statistics
from ddim_cli.models.device import choose_device
from ddim_cli.outputs.files import File
from ddim_cli.sampling.loop import is_out_of_memory
from ddim_cli.sampling.precision import tf32

# Features are kept of so many pictures at most, for the kernel distance: of Inception's 80 MB.
MOST_KEPT = 10_000
# Below so many pictures a feature, the estimated covariance makes the distance much too large.
PICTURES_A_FEATURE = 10

OnImage = Callable[[int, int], None]


@dataclass(frozen=True)
class Summary:
    """What is kept of a set of pictures: their Gaussian, the features [K, D] of some, and what was done to them."""

    gaussian: Gaussian
    features: np.ndarray | None
    notes: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Of the Gaussian's mean and covariance: other pictures have another."""
        return hashlib.sha256(self.gaussian.mean.tobytes() + self.gaussian.covariance.tobytes()).hexdigest()


@dataclass(frozen=True)
class Score:
    """A distance of ``images`` pictures from a reference; smaller is better.

    ``value`` is the squared Frechet distance; ``kid`` is None where the reference, or the pictures, do not allow it;
    ``warning`` says what the number is not good for, or what was done to the pictures.
    """

    value: float
    kid: KernelDistance | None
    images: int
    extractor: Extractor
    features: int
    reference: str
    reference_images: int | None
    reference_sha256: str
    warning: str | None

    @property
    def label(self) -> str:
        """``FID`` for the Inception that defines it; of any other extractor it is no FID."""
        return self.extractor.metric if self.extractor.standard else f"Frechet distance ({self.extractor.name})"

    @property
    def kid_label(self) -> str:
        return "KID" if self.extractor.standard else f"kernel distance ({self.extractor.name})"

    def as_json(self) -> dict[str, Any]:
        return {
            "metric": self.extractor.metric,
            "label": self.label,
            "value": self.value,
            "kid": None if self.kid is None else self.kid._asdict(),
            "images": self.images,
            **_facts(self.extractor, self.features, self.reference, self.reference_images, self.reference_sha256),
            "warning": self.warning,
        }


def _facts(extractor: Extractor, features: int, reference: str, images: int | None, sha256: str) -> dict[str, Any]:
    """What a score is of, beside the pictures."""
    return {
        "extractor": {"name": extractor.name, "sha256": extractor.sha256, "features": features},
        "reference": {"source": reference, "images": images, "sha256": sha256},
    }


@dataclass(frozen=True)
class Judge:
    """An extractor, and a reference in its features, computed once. Make one with `Judge.open`."""

    extractor: Extractor
    device: torch.device
    batch_size: int
    source: str
    reference: Summary
    seed: int = 0

    @classmethod
    def open(
        cls,
        reference: str,
        extractor: str | None = None,
        device: torch.device | str = "cpu",
        batch_size: int = 64,
        *,
        inception: Path | None = None,
        values: str = "unit",
        seed: int = 0,
        on_image: OnImage = lambda done, total: None,
    ) -> Judge:
        """Load the extractor and the reference.

        Args:
            reference: ``"mnist"`` (the MNIST test digits), a folder of pictures, or an .npz of pictures or statistics.
            extractor: ``"mnist"`` (the bundled digit classifier, which the reference of this name implies), a file of
                TorchScript or torch.export, or None for Inception.
            device: where features are computed, ``"auto"`` included.
            batch_size: pictures at a time.
            inception: the file of Inception's weights, where they are not to be fetched.
            values: how an extractor of the user's own takes pictures: ``"unit"``, ``"signed"`` or ``"bytes"``.
            seed: of the kernel distance's subsets.
            on_image: called with the number of the reference's pictures looked at and their total.

        Raises:
            UsageError: for a reference or an extractor that is not there, cannot be used, or do not fit each other.
            RunError: if Inception's weights cannot be fetched, or a feature is not finite.
        """
        check_choice(reference, extractor, inception)
        chosen = BUNDLED if extractor is None and reference == BUNDLED else extractor
        # What is not there is said before anything is loaded.
        pictures = None if reference == BUNDLED or _is_statistics(reference, chosen) else open_pictures(Path(reference))
        place = choose_device(str(device))
        opened = open_extractor(chosen, place, inception, values)
        if pictures is not None:
            summary = _summarize(opened, pictures, place, batch_size, on_image)
        else:
            summary = _read(digits.REFERENCE if reference == BUNDLED else Path(reference), opened)
        source = "MNIST test digits" if reference == BUNDLED else reference
        return cls(opened, place, batch_size, source, summary, seed)

    def score(self, pictures: Sequence[File] | Pictures, on_image: OnImage = lambda done, total: None) -> Score:
        """How far picture files, or other `Pictures`, are from the reference.

        Raises:
            UsageError: for a picture that is missing, damaged or not what the extractor takes; for fewer than two;
                and where the extractor's features are not as many as the reference's.
            RunError: for a feature that is not finite, and for want of memory.
        """
        if isinstance(pictures, Sequence):
            pictures = PictureFiles(pictures)
        found = _summarize(self.extractor, pictures, self.device, self.batch_size, on_image)
        mine, theirs = found.gaussian, self.reference.gaussian
        if len(mine.mean) != len(theirs.mean):
            raise UsageError(
                f"{self.source}: is of {len(theirs.mean)} features, and {self.extractor.name} gives {len(mine.mean)}; "
                "statistics serve only the extractor that they were made with"
            )
        kid = None
        if found.features is not None and self.reference.features is not None:
            kid = kernel_distance(found.features, self.reference.features, self.seed)
        return Score(
            frechet_distance(mine, theirs),
            kid,
            len(pictures),
            self.extractor,
            len(mine.mean),
            self.source,
            theirs.count,
            self.reference.sha256,
            self._warning(found),
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What every score of this judge says of the extractor and the reference."""
        gaussian = self.reference.gaussian
        return _facts(self.extractor, len(gaussian.mean), self.source, gaussian.count, self.reference.sha256)

    def keep_reference(self, path: Path, overwrite: bool = False) -> None:
        """Write the reference's statistics, which `open` takes in its place. Raises as `write_statistics`."""
        write_statistics(path, self.reference.gaussian, self.reference.features, self.extractor.sha256, overwrite)

    def _warning(self, found: Summary) -> str | None:
        features = len(found.gaussian.mean)
        enough = PICTURES_A_FEATURE * features
        few = [
            f"{count:,} {what}"
            for count, what in (
                (found.gaussian.count, "pictures"),
                (self.reference.gaussian.count, "in the reference"),
            )
            if count is not None and count < enough
        ]
        texts = [*found.notes, *(f"in the reference, {note}" for note in self.reference.notes)]
        if few:
            texts.insert(
                0,
                f"few pictures for {features:,} features ({' and '.join(few)}; {enough:,} would do): the distance is "
                "too large, and may be compared only with one of as many pictures",
            )
        return "; ".join(texts) or None


def check_choice(reference: str, extractor: str | None, inception: Path | None) -> None:
    """UsageError for a reference, an extractor and Inception's weights that do not go together."""
    if reference == BUNDLED and extractor not in (None, BUNDLED):
        raise UsageError(
            f"--reference {BUNDLED} is statistics in the features of the bundled digit classifier, which are no use to "
            "another extractor; give it the digits themselves, a folder or an .npz, as --reference"
        )
    if inception is not None and (extractor is not None or reference == BUNDLED):
        raise UsageError("--inception is for Inception's weights, and another extractor is used here; leave it out")


def _is_statistics(reference: str, extractor: str | None) -> bool:
    """Whether an .npz is taken for its statistics.

    Where it has pictures too, its statistics are Inception's: so it is in guided-diffusion's reference batches.
    """
    path = Path(reference)
    if path.suffix != ".npz" or not path.is_file() or not holds(path, "mu"):
        return False
    return extractor is None or not holds(path, "arr_0")


def _read(path: Path, extractor: Extractor) -> Summary:
    found = read_statistics(path)
    if found.extractor is not None and found.extractor != extractor.sha256:
        raise UsageError(
            f"{path}: was made with another extractor (sha256 {found.extractor[:12]}...) than {extractor.name} "
            f"({(extractor.sha256 or 'unknown')[:12]}...)"
        )
    unknown = "statistics that do not say whose features they are of" if found.extractor is None else None
    return Summary(found.gaussian, found.features, (unknown,) if unknown else ())


@torch.inference_mode()
def _summarize(
    extractor: Extractor, pictures: Pictures, device: torch.device, batch_size: int, on_image: OnImage
) -> Summary:
    total, done = len(pictures), 0
    if total < 2:
        where = pictures.where or "no pictures"
        raise UsageError(f"{where}: a distance needs at least two pictures, and here is {total or 'none'}")
    moments, kept = Moments(), []
    notes: dict[str, None] = {}
    positions = spread_out(total, MOST_KEPT)
    with tf32(False):
        for batch in pictures.batches(batch_size):
            x = torch.from_numpy(np.array(batch.transpose(0, 3, 1, 2))).to(device)
            note = extractor.conversion((x.shape[1], x.shape[2], x.shape[3]))
            if note is not None:
                notes[note] = None
            features = _extract(extractor, x, pictures.where)
            moments.add(features)
            mine = positions[(positions >= done) & (positions < done + len(features))]
            kept.append(features[mine - done])
            done += len(features)
            on_image(done, total)
    return Summary(moments.gaussian(), np.concatenate(kept), tuple(notes))


def _extract(extractor: Extractor, x: torch.Tensor, where: str) -> np.ndarray:
    try:
        features = extractor.extract(x).float().cpu().numpy()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(f"out of memory with {len(x)} pictures at a time; use a smaller --batch-size") from None
    if not np.isfinite(features).all():
        raise RunError(f"{where}: {extractor.name} gave features that are not finite numbers")
    return features
