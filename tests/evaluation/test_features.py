"""Extractors: the bundled digits, networks of the user's own, and Inception as torchmetrics has it."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from ddim_cli.errors import UsageError
from ddim_cli.evaluation.features import open_extractor

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def pictures(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


class Colours(nn.Module):
    """Six features: mean and largest value of three channels; one channel is an error."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != 3:
            raise ValueError("three channels were expected")
        return torch.cat([x.float().mean((2, 3)), x.float().amax((2, 3))], 1)


def script(module, path):
    torch.jit.script(module).save(str(path))
    return str(path)


def export(module, path, *shape, dynamic=False):
    dims = ({0: torch.export.Dim("n")},) if dynamic else None
    torch.export.save(torch.export.export(module, (torch.rand(*shape),), dynamic_shapes=dims), path)
    return str(path)


@pytest.mark.parametrize(("values", "scale", "shift"), [("unit", 255, 0), ("signed", 127.5, 1), ("bytes", 1, 0)])
def test_torchscript_takes_pictures_as_asked_for(tmp_path, values, scale, shift):
    x = pictures(3, 3, 4, 5)
    found = open_extractor(script(Colours(), tmp_path / "colours.pt"), CPU, values=values)
    assert found.metric == "Frechet distance"
    assert found.name == "colours.pt"
    assert len(found.sha256) == 64
    torch.testing.assert_close(found.extract(x), Colours()(x.float() / scale - shift))


@pytest.mark.parametrize("kind", ["script", "exported"])
def test_grey_pictures_become_three_channels_where_the_network_wants_that(tmp_path, kind):
    x = pictures(5, 1, 4, 4)
    if kind == "script":
        path = script(Colours(), tmp_path / "colours.pt")
    else:
        path = export(Colours(), tmp_path / "colours.pt2", 2, 3, 4, 4, dynamic=True)
    extract = open_extractor(path, CPU).extract
    torch.testing.assert_close(extract(x), Colours()(x.expand(-1, 3, -1, -1) / 255))
    # And colours as they are, by the same extractor.
    rgb = pictures(5, 3, 4, 4)
    torch.testing.assert_close(extract(rgb), Colours()(rgb / 255))


def test_a_network_of_one_channel_gets_one(tmp_path):
    x = pictures(5, 1, 4, 4)
    path = script(nn.Sequential(nn.Conv2d(1, 3, 4)), tmp_path / "n.pt")
    assert open_extractor(path, CPU).extract(x).shape == (5, 3)


def test_an_exported_program_of_a_fixed_batch_gets_batches_of_it(tmp_path):
    x = pictures(5, 3, 4, 4)
    found = open_extractor(export(Colours(), tmp_path / "colours.pt2", 2, 3, 4, 4), CPU).extract(x)
    torch.testing.assert_close(found, Colours()(x / 255))


class Published(nn.Module):
    """As NVIDIA's metric networks are called: logits, or features where they are asked for."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        mean = x.float().mean((2, 3))
        return mean if return_features else mean[:, :1]


def test_features_are_asked_for_where_that_is_an_argument(tmp_path):
    assert open_extractor(script(Published(), tmp_path / "n.pt"), CPU).extract(pictures(2, 3, 4, 4)).shape == (2, 3)


class Wrong(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_what_gives_no_feature_vectors_is_refused(tmp_path):
    extract = open_extractor(script(Wrong(), tmp_path / "n.pt"), CPU).extract
    with pytest.raises(UsageError, match=r"gave torch.float32 \[2, 3, 4, 4\] for 2 pictures; expected floats \[N, D\]"):
        extract(pictures(2, 3, 4, 4))


def test_what_the_network_says_is_passed_on(tmp_path):
    extract = open_extractor(script(nn.Sequential(nn.Flatten(), nn.Linear(5, 2)), tmp_path / "n.pt"), CPU).extract
    with pytest.raises(UsageError, match=r"failed on a batch of pictures \[2, 3, 4, 4\].*--extractor-input.*shapes"):
        extract(pictures(2, 3, 4, 4))


def test_files_that_are_no_networks_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pt")
    (tmp_path / "broken.pt2").write_bytes(b"PK\x03\x04 and nothing more")
    (tmp_path / "text.pt").write_text("hello")
    for name, message in {
        "weights.pt": "Weights alone do not say",
        "broken.pt2": "cannot be loaded as an exported program",
        "text.pt": "neither TorchScript nor",
        "none.pt": "there is no such file",
    }.items():
        with pytest.raises(UsageError, match=message):
            open_extractor(str(tmp_path / name), CPU)


def test_digits_of_28_pixels_are_padded_and_other_pictures_converted():
    digits = open_extractor("mnist", CPU)
    x = pictures(3, 1, 28, 28)
    padded = nn.functional.pad(x, (2, 2, 2, 2))
    with torch.inference_mode():
        torch.testing.assert_close(digits.extract(x), digits.extract(padded))
        torch.testing.assert_close(digits.extract(x), digits.extract(x.expand(-1, 3, -1, -1)))
        assert digits.extract(pictures(3, 3, 64, 48)).shape == (3, 64)
    assert digits.conversion((1, 28, 28)) is digits.conversion((1, 32, 32)) is None
    assert digits.conversion((3, 48, 64)) == "pictures were resized from 64 x 48 to 32 x 32 and made grey"


# A stand-in for torch-fidelity, with what torchmetrics takes from it. The layers of its Inception are the identity but
# for the first and the last, so that a wrong scale, channel or resize shows in the features.
FIDELITY = {
    "__init__.py": "",
    "helpers.py": "def vassert(true, text): assert true, text",
    "interpolate_compat_tensorflow.py": """
        from torch.nn.functional import interpolate
        def interpolate_bilinear_2d_like_tensorflow1x(x, size, align_corners):
            return interpolate(x, size, mode='nearest')
    """,
    "feature_extractor_inceptionv3.py": """
        import torch
        from torch import nn
        URL_INCEPTION_V3 = 'https://weights.invalid/weights-inception-2015-12-05-6726825d.pth'
        LAYERS = '''Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2 Mixed_5b
            Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d Mixed_6e Mixed_7a Mixed_7b Mixed_7c AvgPool'''.split()
        class FeatureExtractorInceptionV3(nn.Module):
            INPUT_IMAGE_SIZE = 8
            def __init__(self, name, features_list, feature_extractor_weights_path=None):
                super().__init__()
                assert name == 'inception-v3-compat'
                self.features_list = features_list
                for layer in LAYERS:
                    self.add_module(layer, nn.Identity())
                self.Conv2d_1a_3x3, self.AvgPool = nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1)
                if feature_extractor_weights_path is None:
                    raise ConnectionError('no route to host')
                self.load_state_dict(torch.load(feature_extractor_weights_path))
    """,
}


def write_package(folder, name, files, version="0.4.0"):
    (folder / name).mkdir(parents=True)
    for file, text in files.items():
        (folder / name / file).write_text(textwrap.dedent(text))
    (folder / f"{name}-{version}.dist-info").mkdir()
    (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")


def in_a_process(code, folder):
    """Run Python with the packages of ``folder`` before all others."""
    lines = f"import sys\nsys.path[:0] = {[str(folder), str(ROOT)]!r}\n"
    command = [sys.executable, "-c", lines + textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_inception_is_torchmetrics_own(tmp_path):
    """Bytes of three channels, resized as the original does; other weights than the original's make no FID."""
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    write_package(tmp_path, "torch_fidelity", FIDELITY)
    out = in_a_process(
        """
        from pathlib import Path
        import torch
        from ddim_cli.errors import DdimError
        from ddim_cli.evaluation import features
        torch.manual_seed(0)
        first = torch.nn.Conv2d(3, 4, 1)
        torch.save({f'Conv2d_1a_3x3.{k}': v for k, v in first.state_dict().items()}, 'w.pth')
        torch.save({'fc.weight': torch.zeros(2)}, 'other.pth')
        def open_it(name):
            return features.open_extractor(None, torch.device('cpu'), name and Path(name))
        found = open_it('w.pth')
        grey = torch.randint(0, 256, (3, 1, 5, 5), dtype=torch.uint8)
        with torch.inference_mode():
            resized = torch.nn.functional.interpolate(grey.expand(-1, 3, -1, -1).float(), (8, 8))
            expected = first((resized - 128) / 128).mean((2, 3))
            torch.testing.assert_close(found.extract(grey), expected)
            torch.testing.assert_close(found.extract(grey.expand(-1, 3, -1, -1)), expected)
        print(found.name, found.metric)
        features.STANDARD_WEIGHTS = found.sha256[:8]
        print(open_it('w.pth').name, open_it('w.pth').metric)
        for name in ('other.pth', 'none.pth', None):
            try: open_it(name)
            except DdimError as error: print(type(error).__name__, error)
        """,
        tmp_path,
    )
    other, standard, wrong, missing, fetched = out.splitlines()
    assert other == "Inception with the weights w.pth Frechet distance"
    assert standard == "Inception (torch-fidelity) FID"
    assert wrong.startswith("ModelError --inception other.pth: not the weights of this Inception")
    assert missing == "UsageError --inception none.pth: there is no such file"
    assert fetched.startswith("RunError Inception's weights could not be fetched (no route to host); get https://")
    assert "--inception FILE" in fetched


def test_a_pickle_of_weights_runs_nothing(tmp_path):
    import pickle

    class Harm:
        def __reduce__(self):
            return print, ("harm",)

    (tmp_path / "w.pth").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(UsageError, match="refused: it is a pickle of protocol 4"):
        open_extractor(None, CPU, tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("raise ModuleNotFoundError('none', name='torch_fidelity')", "pip install 'ddim-cli[eval]'"),
        ("import torchvision_is_not_here", "a torchvision of the same build as torch"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "operator torchvision::nms does not exist"),
    ],
)
def test_without_torch_fidelity_it_says_what_to_do(tmp_path, monkeypatch, broken, message):
    write_package(tmp_path, "torch_fidelity", {"__init__.py": broken})
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.partition(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UsageError) as error:
        open_extractor(None, CPU)
    assert message in str(error.value)
    assert "--extractor FILE" in str(error.value)
    assert "--extractor mnist" in str(error.value)
