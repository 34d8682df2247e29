"""The page of ``ddim report`` in headless Chromium, opened as a file, as a person would."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ddim_cli.cli.app import app
from ddim_cli.outputs.folder import OutputFolder
from ddim_cli.outputs.sidecar import describe_picture, identity

pytest.importorskip("websocket", reason="the browser is driven through websocket-client")
sys.path.insert(0, str(Path(__file__).parent))
from browser import Browser, find_chromium

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium is here (CHROMIUM may name one)"),
]

OPEN = "document.querySelector('#detail').open"
TITLE = "document.querySelector('#detail-title').textContent"
COUNT = "document.querySelector('#count').textContent"
HASH = "decodeURIComponent(location.hash)"
FOCUS = "document.activeElement.querySelector?.('img')?.alt ?? document.activeElement.id"
# Pictures are looked at in the order in which they lie on the page.
SHOWN = "[...document.querySelectorAll('#gallery img')].map(image => image.getAttribute('src'))"


@pytest.fixture(scope="module")
def browser():
    try:
        found = Browser(find_chromium())
    except RuntimeError as error:
        # Some systems have a program of that name which only tells how to get one.
        pytest.skip(f"{find_chromium()}: {error}")
    yield found
    found.close()


@pytest.fixture
def page(browser):
    """Open a page; whatever a test does with it, it fetches files and data alone, and has nothing to complain of."""

    def show(path, fragment="", **options):
        browser.open(path.as_uri() + fragment, **options)
        return browser

    yield show
    browser.ask("1")
    assert [url for url in browser.requests if not url.startswith(("file:///", "data:"))] == []
    assert browser.errors == []


def report(folder):
    result = CliRunner().invoke(app, ["report", str(folder), "-q"])
    assert result.exit_code == 0, result.stderr
    return folder / "report.html"


@pytest.fixture(scope="module")
def run_page(run_folder, tmp_path_factory):
    return report(shutil.copytree(run_folder, tmp_path_factory.mktemp("pages") / "a run, a=b"))


@pytest.fixture(scope="module")
def sweep_page(sweep_folder, tmp_path_factory):
    return report(shutil.copytree(sweep_folder, tmp_path_factory.mktemp("pages") / "sweep"))


@pytest.fixture(scope="module")
def large_page(run_folder, tmp_path_factory):
    """A thousand pictures of ten classes."""
    manifest = json.loads((run_folder / "run.json").read_text())
    record = {name: manifest[name] for name in ("sampling", "scheduler", "model", "runtime", "config")}
    record["sampling"] = {**record["sampling"], "classes": "0-9"}
    folder = OutputFolder(tmp_path_factory.mktemp("pages") / "large")
    folder.create()
    folder.start(range(1000), record, complete=False)
    random = np.random.default_rng(0)
    for seed in range(1000):
        pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
        its = {**record, "sampling": {**record["sampling"], "class": seed % 10}}
        folder.write(seed, describe_picture(its, seed, pixels), pixels, 0.1, identity(record))
    return report(folder.path)


def raw(browser):
    """The sidecar that the dialog shows, as its text."""
    return browser.ask("document.querySelector('#raw pre').textContent") + "\n"


def seen(browser):
    """Names and values as the dialog lists them."""
    return browser.ask(
        "Object.fromEntries([...document.querySelectorAll('#record section dl')].flatMap(list =>"
        "[...list.querySelectorAll('dt')].map(name => [name.textContent, name.nextElementSibling.textContent])))"
    )


def choose(browser, selector, value):
    """An entry of a list box."""
    browser.ask(
        f"(box => {{ box.value = {json.dumps(value)}; box.dispatchEvent(new Event('change')); }})"
        f"(document.querySelector({json.dumps(selector)}))"
    )
    browser.settle()


def test_a_click_shows_the_sidecar_and_the_picture(page, run_page):
    browser = page(run_page)
    assert browser.ask("document.title") == "a run, a=b"
    assert browser.ask(COUNT) == "12 images"
    assert browser.ask(SHOWN) == [f"{seed:06d}.png" for seed in (*range(10), 100, 101)]
    assert browser.ask("[...document.images].every(image => image.naturalWidth === 8)")
    for at, seed in ((4, 3), (12, 101)):
        browser.click(f"#gallery li:nth-child({at}) button")
        sidecar = (run_page.parent / f"{seed:06d}.json").read_text()
        assert browser.ask(OPEN)
        assert browser.ask(TITLE) == f"Seed {seed}"
        # To the byte: no number has gone through another form.
        assert raw(browser) == sidecar
        told = json.loads(sidecar)
        found = seen(browser)
        assert found["seed"] == str(seed)
        assert found["pixels_sha256"] == told["image"]["pixels_sha256"]
        assert found["eta"] == "0.0"
        assert found["device_name"] == told["runtime"]["device_name"]
        assert browser.ask("document.querySelector('#frame img').naturalWidth") == 8
        assert browser.ask("document.querySelector('#frame img').getAttribute('src')") == f"{seed:06d}.png"
        command = browser.ask("document.querySelector('#again code').textContent")
        assert command == f"ddim replay {seed:06d}.json -o again"
        browser.click("#close")
        assert not browser.ask(OPEN)


def test_every_picture_has_an_alternative_text(page, run_page, sweep_page):
    browser = page(run_page)
    texts = browser.ask("[...document.images].map(image => image.alt)")
    assert texts[:2] == ["seed 0, 2 steps, eta 0.0", "seed 1, 2 steps, eta 0.0"]
    assert len(set(texts)) == 12
    browser = page(sweep_page)
    texts = browser.ask("[...document.querySelectorAll('#side img')].map(image => image.alt)")
    assert texts[0] == "seed 0, steps 1, eta=0.0"
    assert len(set(texts)) == len(texts) == 20


def test_the_keyboard_suffices(page, run_page):
    browser = page(run_page, width=480)
    columns = browser.ask(
        "new Set([...document.querySelectorAll('#gallery li')].map(i => i.getBoundingClientRect().x)).size"
    )
    assert columns == 4
    for _ in range(6):
        browser.press("Tab")
        if browser.ask("document.activeElement.className") == "tile":
            break
    assert browser.ask(FOCUS).startswith("seed 0,")
    browser.press("ArrowRight", 2)
    assert browser.ask(FOCUS).startswith("seed 2,")
    browser.press("ArrowDown")
    assert browser.ask(FOCUS).startswith("seed 6,")
    browser.press("ArrowUp")
    browser.press("ArrowLeft")
    assert browser.ask(FOCUS).startswith("seed 1,")
    browser.press("ArrowUp")
    assert browser.ask(FOCUS).startswith("seed 1,")
    assert browser.ask("document.querySelectorAll('#gallery button[tabindex=\"0\"]').length") == 1
    browser.press("Enter")
    assert (browser.ask(OPEN), browser.ask(TITLE)) == (True, "Seed 1")
    browser.press("ArrowRight", 3)
    assert browser.ask(TITLE) == "Seed 4"
    assert raw(browser) == (run_page.parent / "000004.json").read_text()
    browser.press("ArrowLeft")
    assert browser.ask(TITLE) == "Seed 3"
    browser.press("Escape")
    assert not browser.ask(OPEN)
    # Back at the picture that was looked at last.
    assert browser.ask(FOCUS).startswith("seed 3,")
    browser.press("End")
    browser.press("Enter")
    assert browser.ask(TITLE) == "Seed 101"
    browser.press("ArrowRight")
    assert browser.ask(TITLE) == "Seed 101"
    browser.press("Home")
    assert browser.ask(TITLE) == "Seed 0"
    browser.press("Escape")
    browser.press("/")
    assert browser.ask(FOCUS) == "filter"


def test_the_filter_takes_the_lists_of_the_command_line(page, run_page):
    browser = page(run_page)
    browser.press("/")
    browser.type("2-4,100")
    assert browser.ask(SHOWN) == ["000002.png", "000003.png", "000004.png", "000100.png"]
    assert browser.ask(COUNT) == "4 of 12"
    assert browser.ask(HASH) == "#seeds=2-4,100"
    # Still being typed: what was there stays.
    browser.type(",")
    assert browser.ask(COUNT) == "4 of 12"
    browser.type("x")
    assert "neither a number nor a range" in browser.ask("document.querySelector('#filter-problem').textContent")
    assert browser.ask("document.querySelector('#filter').getAttribute('aria-invalid')") == "true"
    browser.press("Escape")
    assert browser.ask(COUNT) == "12 images"
    assert browser.ask("document.querySelector('#filter-problem').hidden")
    browser.type("5-3")
    assert "runs backwards" in browser.ask("document.querySelector('#filter-problem').textContent")
    browser.press("Escape")
    browser.type("77")
    assert browser.ask(SHOWN) == []
    assert not browser.ask("document.querySelector('#empty').hidden")


def test_a_reload_comes_back_to_the_same_place(page, run_page, sweep_page):
    browser = page(run_page, "#seeds=2-4,100&seed=100")
    assert (browser.ask(OPEN), browser.ask(TITLE)) == (True, "Seed 100")
    assert browser.ask(COUNT) == "4 of 12"
    browser.press("ArrowLeft")
    assert browser.ask(HASH) == "#seeds=2-4,100&seed=4"
    browser = page(sweep_page, "#view=gallery&at=2,0")
    assert browser.ask(SHOWN) == [f"steps%3D3%2C%20eta%3D0.0/{seed:06d}.png" for seed in range(4)]
    for nonsense in ("#at=9,9&view=nothing&seed=x&seeds=%%&each=1e9&across=7", "#at=,", "#seeds=1-&seed=__proto__"):
        browser = page(sweep_page, nonsense)
        assert not browser.ask(OPEN)
        assert browser.ask("document.querySelectorAll('#side td.cell').length") == 6


def test_a_thousand_pictures_are_not_loaded_at_once(page, large_page):
    browser = page(large_page)
    assert browser.ask(COUNT) == "1,000 images"
    first = browser.ask("document.images.length")
    assert 20 < first < 300
    loaded = {url for url in browser.requests if url.endswith(".png")}
    assert len(loaded) == first
    browser.ask("window.scrollTo(0, document.body.scrollHeight)")
    browser.settle()
    assert "000999.png" in browser.ask(SHOWN)
    assert "000100.png" not in browser.ask(SHOWN)
    assert browser.ask("document.images.length") < 300
    # In their order, also for those that were put before others.
    browser.ask("window.scrollTo(0, document.body.scrollHeight / 2)")
    browser.settle()
    shown = browser.ask(SHOWN)
    assert shown == sorted(shown)
    places = browser.ask(
        "[...document.querySelectorAll('#gallery li')].map(item => item.getAttribute('aria-posinset'))"
    )
    assert places == [str(int(name[:6]) + 1) for name in shown]
    browser.ask("document.querySelector('#gallery button').focus()")
    browser.press("End")
    assert browser.ask(FOCUS).startswith("seed 999,")
    browser.press("PageUp")
    browser.press("Home")
    assert browser.ask(FOCUS) == "seed 0, class 0, 2 steps, eta 0.0"
    assert browser.ask("window.scrollY") < 300


def test_classes(page, large_page):
    browser = page(large_page)
    assert browser.ask("[...document.querySelectorAll('#class option')].map(o => o.textContent)") == [
        "all",
        *map(str, range(10)),
    ]
    choose(browser, "#class", "7")
    assert browser.ask(COUNT) == "100 of 1,000"
    assert browser.ask(SHOWN)[:3] == ["000007.png", "000017.png", "000027.png"]


def test_a_slider_changes_the_pictures(page, sweep_page):
    browser = page(sweep_page, "#view=gallery")

    def folder(name):
        return [f"{name}/{seed:06d}.png" for seed in range(len(browser.ask(SHOWN)))]

    assert browser.ask(SHOWN) == folder("steps%3D1%2C%20eta%3D0.0")
    assert browser.ask(COUNT) == "6 images"
    browser.ask("document.querySelector('#axis-0').focus()")
    browser.press("ArrowRight")
    assert browser.ask(SHOWN) == folder("steps%3D2%2C%20eta%3D0.0")
    assert browser.ask("document.querySelector('#axis-0').getAttribute('aria-valuetext')") == "2"
    browser.ask("document.querySelector('#axis-1').focus()")
    browser.press("ArrowRight")
    assert browser.ask(SHOWN) == folder("steps%3D2%2C%20variance%3Dlarge")
    assert browser.ask("document.querySelector('#axis-1').getAttribute('aria-valuetext')") == "variance=large"
    assert browser.ask("[...document.images].every(image => image.naturalWidth === 8)")
    browser.click("#gallery li:nth-child(5) button")
    assert raw(browser) == (sweep_page.parent / "steps=2, variance=large" / "000004.json").read_text()
    command = browser.ask("document.querySelector('#again code').textContent")
    assert command == "ddim replay 'steps=2, variance=large/000004.json' -o again"
    # The same seed in the four cells that have it; another cell from there.
    assert browser.ask("document.querySelectorAll('#others img').length") == 4
    browser.click("#others button:first-child")
    assert raw(browser) == (sweep_page.parent / "steps=1, eta=0.0" / "000004.json").read_text()
    browser.press("Escape")
    assert browser.ask(HASH) == "#view=gallery"
    # A cell of which nothing is there yet.
    browser.ask("document.querySelector('#axis-0').focus()")
    browser.press("End")
    assert browser.ask(COUNT) == "4 images"
    browser.ask("document.querySelector('#axis-1').focus()")
    browser.press("End")
    assert browser.ask(SHOWN) == []
    assert browser.ask("document.querySelector('#empty').textContent") == "Nothing has been made here yet."


def test_cells_side_by_side(page, sweep_page):
    browser = page(sweep_page)
    rows = browser.ask(
        "[...document.querySelectorAll('#side tbody tr')].map(row => [row.querySelector('th').textContent,"
        "...[...row.querySelectorAll('td')].map(cell => [...cell.querySelectorAll('img')].map(i => i.src.slice(-10)))])"
    )
    four = [f"{seed:06d}.png" for seed in range(4)]
    assert rows == [["eta=0.0", four, four, four], ["variance=large", four, four, []]]
    heads = browser.ask("[...document.querySelectorAll('#side thead th[scope=col]')].map(head => head.textContent)")
    assert heads == ["variant", "1", "2", "3"]
    scores = browser.ask("[...document.querySelectorAll('#side .go b')].map(text => text.textContent)")
    assert scores == ["FD 30.50", "FD 15.25", "FD 10.17", "FD 130.50", "FD 115.25", "0 of 4 images"]
    assert "3 images/s" in browser.ask("document.querySelector('#side .go small').textContent")
    assert browser.ask("document.querySelector('#side .best').closest('td').cellIndex") == 3
    # The filter chooses the seeds; a cell without one of them says so, in its place.
    browser.press("/")
    browser.type("3-5")
    places = browser.ask("[...document.querySelectorAll('#side td')][3].querySelector('.thumbs').children.length")
    assert places == 3
    missing = browser.ask("[...document.querySelectorAll('#side tbody td')][2].querySelectorAll('.none').length")
    assert missing == 2
    browser.press("Escape")
    # Arrow keys go from picture to picture, over the cells' edges too.
    browser.ask("document.querySelector('#side img').closest('button').focus()")
    assert browser.ask(FOCUS) == "seed 0, steps 1, eta=0.0"
    browser.press("ArrowRight", 2)
    assert browser.ask(FOCUS) == "seed 0, steps 2, eta=0.0"
    browser.press("Enter")
    assert raw(browser) == (sweep_page.parent / "steps=2, eta=0.0" / "000000.json").read_text()
    browser.press("Escape")
    assert browser.ask(FOCUS) == "seed 0, steps 2, eta=0.0"
    assert browser.ask("document.querySelector('#side td.current').cellIndex") == 2
    # The other axis across.
    browser.ask(
        "(box => { box.value = '1'; box.dispatchEvent(new Event('change')); })(document.querySelector('#across'))"
    )
    heads = browser.ask("[...document.querySelectorAll('#side thead th[scope=col]')].map(head => head.textContent)")
    assert heads == ["steps", "eta=0.0", "variance=large"]


def test_the_table_of_cells(page, sweep_page):
    browser = page(sweep_page, "#view=table")

    def column(at):
        return browser.ask(
            f"[...document.querySelectorAll('#table tbody tr')].map(row => row.children[{at}].textContent)"
        )

    assert column(1) == ["eta=0.0", "variance=large"] * 3
    assert column(2)[-1] == "0 of 4"
    browser.click("#table th:nth-child(5) button")
    assert column(4) == ["best 10.17", "15.25", "30.50", "115.25", "130.50", ""]
    assert browser.ask("document.querySelector('#table th:nth-child(5)').getAttribute('aria-sort')") == "ascending"
    browser.click("#table tbody tr:first-child button")
    assert browser.ask(SHOWN)[0] == "steps%3D3%2C%20eta%3D0.0/000000.png"


def test_what_is_wrong_is_on_the_page(page, run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    sidecar = json.loads((folder / "000003.json").read_text())
    hostile = "</script><img src=x onerror=\"document.title='broken in'\"><b>\u2028"
    sidecar["model"]["source"] = hostile
    (folder / "000003.json").write_text(json.dumps(sidecar))
    (folder / "000001.png").write_bytes(b"no picture")
    (folder / "000001.json").unlink()
    (folder / "000002.json").unlink()
    (folder / "000002.png").unlink()
    browser = page(report(folder))
    browser.wait("document.querySelector('.tile.broken') !== null")
    assert browser.ask("document.querySelector('.tile.broken img').alt") == "seed 1, 2 steps, eta 0.0"
    notices = browser.ask("document.querySelector('#notices').textContent")
    assert "Not finished: 11 of 12 planned images are there" in notices
    assert "000001.png has no sidecar" in notices
    browser.click("#gallery li:nth-child(2) button")
    assert "Nothing is known" in browser.ask("document.querySelector('#record').textContent")
    browser.wait("!document.querySelector('#broken').hidden")
    browser.press("ArrowRight")
    assert browser.ask(TITLE) == "Seed 3"
    assert seen(browser)["source"] == hostile
    assert browser.ask("document.title") == "run"
    assert browser.ask("document.querySelectorAll('#record b, #record img').length") == 0


def test_the_pictures_inside(page, run_folder, tmp_path):
    one = tmp_path / "alone" / "one.html"
    one.parent.mkdir()
    result = CliRunner().invoke(app, ["report", str(run_folder), "--embed", "-o", str(one), "-q"])
    assert result.exit_code == 0
    browser = page(one)
    assert browser.ask("document.images.length") == 12
    assert browser.ask("[...document.images].every(image => image.naturalWidth === 8)")
    assert [url for url in browser.requests if url.startswith("file:")] == [one.as_uri()]


def test_light_and_dark(page, run_page):
    background = "getComputedStyle(document.documentElement).backgroundColor"
    browser = page(run_page)
    light = browser.ask(background)
    browser = page(run_page, dark=True)
    dark = browser.ask(background)
    assert light != dark
    browser.click("#theme")
    assert browser.ask(background) == light
    # Remembered where there is storage; files have it in Chromium.
    browser = page(run_page, dark=True)
    assert browser.ask(background) == light
    browser.click("#theme")
    assert browser.ask(background) == dark
    browser.ask("localStorage.clear()")


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_on_its_ground(page, sweep_page, dark):
    """WCAG 2.2, 1.4.3: a contrast of 4.5 for every text that is shown, and nothing wider than a phone."""
    script = """(() => {
      const canvas = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
      const paint = colours => {
        canvas.clearRect(0, 0, 1, 1);
        for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255)
          .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
      };
      const luminance = ([r, g, b]) => 0.2126 * r + 0.7152 * g + 0.0722 * b;
      const poor = [];
      for (const element of document.querySelectorAll('body *')) {
        const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
        if (!own || !element.checkVisibility() || ['SCRIPT', 'STYLE', 'OPTION'].includes(element.tagName)) continue;
        if (element.disabled) continue;
        const grounds = [];
        for (let at = element; at; at = at.parentElement) grounds.unshift(getComputedStyle(at).backgroundColor);
        const [a, b] = [luminance(paint([...grounds, getComputedStyle(element).color])), luminance(paint(grounds))];
        const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (contrast < 4.5) poor.push([element.tagName, element.className, element.textContent, contrast]);
      }
      return poor;
    })()"""
    for view in ("side", "table", "gallery", "gallery&seed=1"):
        browser = page(sweep_page, f"#view={view}", width=390, dark=dark)
        assert browser.ask(script) == [], view
        assert browser.ask("document.documentElement.scrollWidth") <= 390


@pytest.fixture(scope="module")
def text_page(run_folder, tmp_path_factory):
    """A hundred pictures of four prompts, one of which would be HTML, and a negative prompt."""
    manifest = json.loads((run_folder / "run.json").read_text())
    record = {name: manifest[name] for name in ("sampling", "scheduler", "model", "runtime", "config")}
    prompts = ["A bold seven", "a thin one", "<b>two</b>, thin", "ein 数字"]
    record["sampling"] = {**record["sampling"], "prompts": prompts, "negative_prompt": "blurred"}
    folder = OutputFolder(tmp_path_factory.mktemp("pages") / "text")
    folder.create()
    folder.start(range(100), record, complete=False)
    for seed in range(100):
        pixels = np.full((8, 8, 3), seed, np.uint8)
        its = {**record, "sampling": {**record["sampling"], "prompt": prompts[seed % 4]}}
        folder.write(seed, describe_picture(its, seed, pixels), pixels, 0.1, identity(its))
    return report(folder.path)


def test_prompts_are_shown_and_searched(page, text_page):
    browser = page(text_page)
    prompt = "#gallery li:nth-child({}) .prompt"
    shown = [browser.ask(f"document.querySelector({prompt.format(n)!r}).textContent") for n in (1, 3, 4)]
    assert shown == ["A bold seven", "<b>two</b>, thin", "ein 数字"]
    # From anywhere, by the keyboard alone; each word narrows, whatever its case.
    browser.press("/")
    for typed, count in (("THIN", "50 of 100"), (" two", "25 of 100")):
        browser.type(typed)
        assert browser.ask(COUNT) == count
    assert browser.ask("document.activeElement.id") == "search"
    assert browser.ask(HASH).replace("+", " ") == "#search=THIN two"
    browser.press("Escape")
    assert browser.ask(COUNT) == "100 images"
    for fragment, count in (
        ("#search=blurred", "100 images"),
        ("#search=数字", "25 of 100"),
        ("#search=xyz", "0 of 100"),
    ):
        assert page(text_page, fragment).ask(COUNT) == count
    assert "left by the filter" in browser.ask("document.querySelector('#empty').textContent")


def test_a_picture_tells_its_prompts(page, text_page):
    browser = page(text_page, "#search=two&seed=2")
    assert browser.ask("[...document.querySelectorAll('#prompts > *')].map(e => e.textContent)") == [
        "Prompt", "<b>two</b>, thin", "Negative prompt", "blurred",
    ]  # fmt: skip
    # The pictures that are gone through are those that were found.
    browser.press("ArrowRight")
    assert browser.ask(TITLE) == "Seed 6"


def test_a_page_without_prompts_has_no_search(page, run_page):
    browser = page(run_page)
    assert browser.ask("document.querySelector('#search-field').hidden")
    assert not browser.ask("document.querySelector('#gallery .prompt')")
    browser.press("/")
    assert browser.ask("document.activeElement.id") == "filter"
