"""The page of ``ddim report``, without a browser: what it tells, and that it fetches nothing."""

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from ddim_cli.outputs.folder import OutputFolder
from ddim_cli.outputs.sidecar import describe_picture, identity

HOSTILE = (
    "</script><script>alert(1)</script></script x </script/ <!--<script \u2028 &lt; \"quoted\" 'too' </style> "
    "javascript:alert(2)"
)


class Page(HTMLParser):
    """The elements of a page, and the text of its scripts and styles."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.texts, self._inside = [], {"script": [], "style": []}, None
        self.source = path.read_text()
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside = tag
        if tag in self.texts:
            self.texts[tag].append("")

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, text):
        if self._inside in self.texts:
            self.texts[self._inside][-1] += text

    @property
    def data(self):
        return json.loads(self.texts["script"][0])


def records(found):
    """number -> the sidecar as the page tells it, put together from its parts."""
    told = {}
    for number, _, group, row, _ in found["pictures"]:
        parts, record = found["groups"][group], {}
        texts = list(parts["texts"])
        for at, text in zip(parts["varying"], row, strict=True):
            assert texts[at] is None
            texts[at] = text
        for path, text in zip(parts["paths"], texts, strict=True):
            inner = record
            for key in path[:-1]:
                inner = inner.setdefault(key, {})
            inner[path[-1]] = json.loads(text)
        told[int(number)] = record
    return told


def exact(value):
    """JSON text, in which order counts, and 0 is not 0.0."""
    return json.dumps(value)


@pytest.fixture
def copied(run_folder, tmp_path):
    return shutil.copytree(run_folder, tmp_path / "a run")


def test_the_page_tells_every_sidecar_exactly(ddim, copied):
    result = ddim("report", copied, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told == {
        "report": str(copied / "report.html"),
        "kind": "run",
        "images": 12,
        "sets": 1,
        "problems": [],
        "bytes": (copied / "report.html").stat().st_size,
        "embedded": False,
    }
    data = Page(copied / "report.html").data
    [pictures] = data["sets"]
    found = records(pictures)
    assert list(found) == [*range(10), 100, 101]
    for seed, record in found.items():
        assert exact(record) == exact(json.loads((copied / f"{seed:06d}.json").read_text()))
    for number, source, *_ in pictures["pictures"]:
        assert source == f"{int(number):06d}.png"
    # What all sidecars share is told once.
    assert (copied / "report.html").read_text().count("config_sha256") < 5
    assert pictures["about"] == "2 steps, eta 0.0"
    facts = dict(pictures["facts"])
    assert (facts["images"], facts["steps"], facts["eta"], facts["size"]) == ("12", "2", "0.0", "8 x 8")
    assert dict(map(tuple, dict(map(tuple, pictures["settings"]))["sampling"]))["steps"] == "2"


def test_nothing_is_loaded_from_anywhere(ddim, copied):
    assert ddim("report", copied, "-q").exit_code == 0
    page = Page(copied / "report.html")
    assert [t for t, _ in page.elements if t in ("iframe", "object", "embed", "base", "audio", "video", "form")] == []
    places = [(t, a[key]) for t, a in page.elements for key in ("src", "href", "srcset", "action", "data") if key in a]
    assert places == [("link", "data:,"), ("a", "#pictures")]
    script, style = page.texts["script"][1], page.texts["style"][0]
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|import\(|innerHTML|eval\(", script + style)
    [policy] = [a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    for name, text in (("script-src", script), ("style-src", style)):
        assert rules[name] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    # A browser that has read this policy before anything else.
    kinds = [t for t, _ in page.elements]
    assert kinds.index("meta") < kinds.index("title") < kinds.index("style") < kinds.index("script")


def test_hostile_sidecars_stay_data(ddim, copied):
    path = copied / "000003.json"
    sidecar = json.loads(path.read_text())
    sidecar["model"]["source"] = HOSTILE
    sidecar["sampling"][HOSTILE] = {"__proto__": HOSTILE, "": [HOSTILE, 2**63 - 1, 0.0, 0, -0.0]}
    path.write_text(json.dumps(sidecar))
    (copied / "run.json").write_text((copied / "run.json").read_text().replace('"bundled"', json.dumps(HOSTILE)))
    assert ddim("report", copied, "-q").exit_code == 0
    page = Page(copied / "report.html")
    assert [t for t, _ in page.elements].count("script") == 2
    # Nothing in it can end the script, or open a comment in it, in any reading of HTML.
    data = page.source.split('<script type="application/json" id="data">')[1].split("</script>\n<script>")[0]
    assert json.loads(data) == page.data
    assert not set("<>&") & set(data)
    assert "\u2028" not in page.source
    assert exact(records(page.data["sets"][0])[3]) == exact(sidecar)


def test_a_name_that_is_no_text_and_one_that_is_markup(ddim, run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "<b>{{data}}&amp;")
    assert ddim("report", folder, "-q").exit_code == 0
    page = Page(folder / "report.html")
    assert page.data["title"] == "<b>{{data}}&amp;"
    assert "<title>&lt;b&gt;{{data}}&amp;amp;</title>" in page.source


def test_verify_and_sample_live_with_it_and_it_is_the_same_each_time(ddim, copied):
    assert ddim("report", copied, "-q").exit_code == 0
    first = (copied / "report.html").read_bytes()
    (copied / ".report.html.0123456789ab.tmp").write_bytes(b"of one that was killed")
    assert ddim("report", copied, "-q").exit_code == 0
    assert (copied / "report.html").read_bytes() == first
    assert [path.name for path in copied.iterdir() if path.name.startswith(".")] == []
    assert ddim("verify", copied).exit_code == 0


def test_pictures_inside(ddim, copied, tmp_path):
    assert ddim("report", copied, "--embed", "-o", tmp_path / "one.html").exit_code == 0
    assert not (copied / "report.html").exists()
    for number, source, *_ in Page(tmp_path / "one.html").data["sets"][0]["pictures"]:
        kind, text = source.split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(text) == (copied / f"{int(number):06d}.png").read_bytes()


def test_a_page_elsewhere_finds_the_pictures(ddim, copied, tmp_path):
    (tmp_path / "pages").mkdir()
    assert ddim("report", copied, "-o", tmp_path / "pages" / "it.html").exit_code == 0
    for _, source, *_ in Page(tmp_path / "pages" / "it.html").data["sets"][0]["pictures"]:
        assert source.startswith("../a%20run/")
        assert (tmp_path / "pages" / unquote(source)).exists()


def test_what_is_wrong_is_said_and_the_rest_is_shown(ddim, copied):
    (copied / "000001.json").unlink()
    (copied / "000002.json").write_text('{"schema": "ddim-cli/sidecar/1", "seed": NaN}')
    (copied / "000003.json").write_text("{")
    (copied / "000004.png").unlink()
    (copied / "000005.png").write_bytes((copied / "000005.png").read_bytes()[:40])
    (copied / "000006.png").unlink()
    (copied / "000006.json").unlink()
    shutil.copy(copied / "000007.png", copied / "000050.png")
    (copied / "000050.png").write_bytes(b"no picture")
    result = ddim("report", copied, "--json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    expected = {
        "000001.png": "has no sidecar; the text inside it is shown",
        "000002.png": "has a sidecar with values that are no JSON",
        "000003.png": "has a sidecar that is damaged; the text inside it is shown",
        "000004.png": "is not there, its sidecar is",
        "000005.png": "has 40 bytes, its sidecar says",
        "000050.png": "has no sidecar, and no text inside",
    }
    for name, words in expected.items():
        assert any(problem.startswith(f"{name} {words}") for problem in told["problems"]), name
        assert name in result.stderr
    assert any("extra" in problem for problem in told["problems"])
    assert told["images"] == 11
    [pictures] = Page(copied / "report.html").data["sets"]
    assert (pictures["planned"], len(pictures["pictures"])) == (12, 11)
    assert [number for number, _, group, *_ in pictures["pictures"] if group == -1] == ["2", "50"]


def test_a_run_that_is_not_finished(ddim, copied):
    for seed in range(5):
        (copied / f"{seed:06d}.png").unlink()
        (copied / f"{seed:06d}.json").unlink()
    assert ddim("report", copied, "-q").exit_code == 0
    data = Page(copied / "report.html").data
    assert dict(data["sets"][0]["facts"])["images"] == "7 of 12"
    assert data["problems"] == []


def test_large_seeds_and_subfolders(ddim, run_folder, tmp_path):
    manifest = json.loads((run_folder / "run.json").read_text())
    record = {name: manifest[name] for name in ("sampling", "scheduler", "model", "runtime", "config")}
    folder, seeds = OutputFolder(tmp_path / "out", subdirs=True), (7, 1500, 2**63 - 1)
    folder.create()
    folder.start(seeds, record, complete=False)
    pixels = np.zeros((8, 8, 3), np.uint8)
    for seed in seeds:
        folder.write(seed, describe_picture(record, seed, pixels), pixels, 0.1, identity(record))
    assert ddim("report", "out", "-q").exit_code == 0
    [pictures] = Page(tmp_path / "out" / "report.html").data["sets"]
    assert [one[:2] for one in pictures["pictures"]] == [
        ["7", "000000/000007.png"],
        ["1500", "001000/001500.png"],
        [str(2**63 - 1), f"{(2**63 - 1) // 1000 * 1000}/{2**63 - 1}.png"],
    ]
    assert records(pictures)[2**63 - 1]["seed"] == 2**63 - 1


def test_pictures_from_latents(ddim, tiny_model, tmp_path):
    digit = Path(__file__).parents[1] / "data" / "digits" / "3.png"
    assert ddim("invert", digit, "-m", tiny_model, "--steps", 2, "-o", "out").exit_code == 0
    assert ddim("sample", "--latents", "out/3.latent.safetensors", "-o", "out").exit_code == 0
    assert ddim("report", "out").exit_code == 0
    [found] = Page(tmp_path / "out" / "report.html").data["sets"]
    labels = [(source, label) for _, source, _, _, label in found["pictures"]]
    assert labels == [("3.latent.png", "3.latent"), ("3.recon.png", "3.recon")]
    assert records(found)[2] == json.loads((tmp_path / "out" / "3.recon.json").read_text())


def test_frames_and_strips(ddim, tiny_model, tmp_path):
    settings = ("-m", tiny_model, "--steps", 2, "-o", "out", "-q")
    assert ddim("interpolate", "--between", "3,8", "--frames", 3, *settings).exit_code == 0
    assert ddim("trajectory", "--seeds", "3,8", *settings).exit_code == 0
    result = ddim("report", "out", "--json")
    assert result.exit_code == 0, result.stderr
    frames, strips = Page(tmp_path / "out" / "report.html").data["sets"]
    assert (frames["name"], frames["noun"], frames["about"]) == ("frames", "frame", "2 steps, eta 0.0")
    labels = [[number, source, label] for number, source, _, _, label in frames["pictures"]]
    assert labels[1] == ["1", "frame_001.png", "between seeds 3 and 8, at 0.5"]
    assert records(frames)[2] == json.loads((tmp_path / "out" / "frame_002.json").read_text())
    assert [[number, source] for number, source, *_ in strips["pictures"]] == [
        ["3", "000003.x0.png"],
        ["8", "000008.x0.png"],
    ]
    assert records(strips)[8]["strip"]["show"] == "x0"
    assert json.loads(result.stdout)["problems"] == []


def test_a_sweep(ddim, sweep_folder, tmp_path):
    root = shutil.copytree(sweep_folder, tmp_path / "sweep")
    result = ddim("report", root, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["kind"], told["images"], told["sets"], told["problems"]) == ("sweep", 28, 6, [])
    data = Page(root / "report.html").data
    assert data["axes"] == [
        {"name": "steps", "values": ["1", "2", "3"]},
        {"name": "variant", "values": ["eta=0.0", "variance=large"]},
    ]
    for one in data["sets"]:
        assert one["about"] == f"steps {one['at'][0] + 1}, {data['axes'][1]['values'][one['at'][1]]}"
        for number, source, *_ in one["pictures"]:
            assert "," not in source
            assert " " not in source
            assert (root / unquote(source)) == root / one["folder"] / f"{int(number):06d}.png"
            assert (root / unquote(source)).exists()
        for seed, record in records(one).items():
            own = json.loads((root / one["folder"] / f"{seed:06d}.json").read_text())
            assert exact(record) == exact(own)
            assert len(record["sampling"]["timesteps"]) == one["at"][0] + 1
    last = data["sets"][-1]
    assert (last["finished"], last["planned"], last["pictures"], last["score"]) == (False, 4, [], None)
    assert [one["planned"] for one in data["sets"]] == [6, 6, 6, 6, 4, 4]
    score = data["sets"][2]["score"]
    assert (score["short"], score["text"], score["kid"]) == ("FD", "15.25", "0.0123 ± 0.001")
    assert dict(data["facts"])["cells"] == "5 of 6 finished"


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "something/else"},
        {"cells": [{"at": [0, 0], "folder": "../elsewhere"}]},
        {"cells": [{"at": [0, 0], "folder": "/etc"}]},
        {"cells": [{"at": [9, 0], "folder": "a"}]},
        {"cells": [{"at": [0], "folder": "a"}]},
        {"cells": [{"at": [0, 0], "folder": "a"}, {"at": [0, 0], "folder": "b"}]},
        {"axes": [{"name": "steps"}]},
        {"axes": None},
        {"cells": "many"},
    ],
)
def test_a_sweep_that_is_none(ddim, sweep_folder, tmp_path, change):
    sweep = json.loads((sweep_folder / "sweep.json").read_text())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.json").write_text(json.dumps({**sweep, **change}))
    result = ddim("report", "out")
    assert result.exit_code == 2
    assert "sweep.json" in result.stderr
    assert not (tmp_path / "out" / "report.html").exists()


def test_folders_that_cannot_be_shown(ddim, copied, tmp_path):
    result = ddim("report", "nowhere", "--json")
    assert result.exit_code == 2
    assert "no such folder" in json.loads(result.stdout)["error"]
    (tmp_path / "empty").mkdir()
    result = ddim("report", "empty")
    assert result.exit_code == 2
    for name in ("ddim sample", "interpolate", "trajectory", "sweep"):
        assert name in result.stderr
    assert list((tmp_path / "empty").iterdir()) == []
    result = ddim("report", copied / "000001.png")
    assert result.exit_code == 2
    assert "not a folder" in result.stderr


def test_files_that_cannot_be_written(ddim, copied, tmp_path):
    for target in (copied / "run.json", copied / "000003.png"):
        before = target.read_bytes()
        result = ddim("report", copied, "-o", target)
        assert result.exit_code == 2
        assert "no page of ddim report" in result.stderr
        assert target.read_bytes() == before
    assert ddim("report", copied, "-o", tmp_path / "nowhere" / "a.html").exit_code == 2
    assert ddim("report", copied, "-o", tmp_path).exit_code == 2
    assert ddim("report", copied, "-o", tmp_path / ("x" * 300)).exit_code == 2


def test_prompts_are_among_the_facts_and_frames_between_them_have_labels(ddim, tiny_text_model, tmp_path):
    from ddim_cli.outputs.report.contents import Links
    from ddim_cli.outputs.report.page import contents

    plain = ("-m", tiny_text_model, "--prompt", "a seven", "--negative-prompt", "thin", "--steps", 2, "--no-compile")
    assert ddim("sample", *plain, "-n", 2, "-o", "one").exit_code == 0
    assert ddim("sample", *plain, "--prompt", "a two", "-n", 2, "-o", "two").exit_code == 0
    assert ddim("interpolate", *plain, "--to-prompt", "a two", "--frames", 3, "-o", "between").exit_code == 0
    found = {name: contents(tmp_path / name, Links(tmp_path))["sets"][0] for name in ("one", "two", "between")}
    facts = {name: dict(one["facts"]) for name, one in found.items()}
    assert (facts["one"]["prompt"], facts["one"]["negative prompt"]) == ("a seven", "thin")
    assert facts["two"]["prompt"] == "2 prompts"
    labels = [picture[-1] for picture in found["between"]["pictures"]]
    assert labels[1] == 'between "a seven" and "a two", at 0.5'
