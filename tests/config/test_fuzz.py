"""Whatever stands in a TOML file, `config check` and `sample --dry-run` end with 0 or 2 and a sentence."""

import random
from pathlib import Path

import pytest
from typer.main import get_command

from ddim_cli.cli.app import app
from ddim_cli.config.layers import key_schema
from ddim_cli.config.schema import KEYS, SECTIONS

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
# Of each kind something that is right somewhere, and much that is right nowhere.
VALUES = (
    *("true", "false", "0", "1", "-1", "2", "7", "16", "999", "1000", "1001", "10_000_000", "9" * 30, "0x10", "1e400"),
    *("0.0", "0.5", "1.0", "1.5", "-0.1", "nan", "inf", "-inf", "1e-300", "1e300", "0.9999999"),
    *('""', '"auto"', '"0-63,100"', '"5-2"', '"x"', '"ddim"', '"large"', '"\\u0000"', '"é\\n"', '"../.."', "'''a'''"),
    *("[]", "[1]", "[999, 500, 0]", "[0, 500]", "[0.1, 0.2]", "[[1]]", '["a"]', "[32, 32]", "{}", "{ a = 1 }"),
    *("1979-05-27", "07:32:00", "1979-05-27T07:32:00Z"),
)
NOISE = ("[", "]", "=", '"', "#", "\n", ".", "\x00", "\x7f", "é", "\ufeff", "[sampling]", "[[model]]", "a.b.c = 1\n")


def a_value(draw: random.Random, key: str) -> str:
    """Half of the time one that the key allows, so that what is judged later is reached."""
    options = [s.get("enum") for s in (key_schema(key), *key_schema(key).get("anyOf", ()))]
    allowed = [f'"{o}"' for found in options for o in found or ()]
    return draw.choice(allowed) if allowed and draw.random() < 0.5 else draw.choice(VALUES)


def from_keys(draw: random.Random) -> str:
    lines = []
    for section in draw.sample(sorted(SECTIONS), draw.randint(1, len(SECTIONS))):
        lines.append(f"[{section}]")
        names = [k.partition(".")[2] for k in KEYS if k.startswith(f"{section}.")]
        for name in draw.sample(names, min(len(names), draw.choice((1, 1, 2, 3, 5)))):
            # A model of one's own would be looked for on disk and on the Hub.
            if name not in ("source", "revision"):
                lines.append(f"{name} = {a_value(draw, f'{section}.{name}')}")
    return "\n".join(lines)


def mutated(draw: random.Random) -> str:
    """A shipped config with some characters or lines changed, or a new one."""
    if draw.random() < 0.6:
        text = from_keys(draw)
    else:
        text = draw.choice([p.read_text() for p in CONFIGS if p.stem in ("default", "smoke", "ddpm", "few_steps")])
    for _ in range(draw.choice((0, 0, 1, 1, 2, 4))):
        at = draw.randrange(len(text) + 1)
        kind = draw.random()
        if kind < 0.4:
            text = text[:at] + draw.choice((*NOISE, *VALUES)) + text[at:]
        elif kind < 0.7:
            text = text[:at] + text[at + draw.randint(1, 6) :]
        else:
            lines = text.splitlines()
            draw.shuffle(lines)
            text = "\n".join(lines)
    return text


def run(args: list[str], capsys) -> tuple[int, str]:
    """The command in this process, without building its parser anew each time."""
    with pytest.raises(SystemExit) as end:
        run.command(args, prog_name="ddim")
    return end.value.code or 0, capsys.readouterr().err


@pytest.mark.parametrize(("seed", "count"), [(0, 200), pytest.param(1, 1000, marks=pytest.mark.slow)])
def test_no_config_gives_a_traceback(tiny_model, tmp_path, monkeypatch, capsys, seed, count):
    monkeypatch.chdir(tmp_path)
    run.command, draw = get_command(app), random.Random(seed)
    codes = {"check": [], "dry": []}
    for i in range(count):
        text = mutated(draw)
        Path("run.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
        for name, args in (
            ("check", ["config", "check", "run.toml"]),
            ("dry", ["sample", "--dry-run", "-c", "run.toml", "-m", str(tiny_model), "--device", "cpu"]),
        ):
            code, stderr = run(args, capsys)
            assert code in (0, 2), (i, name, text, stderr)
            assert (code == 2) == ("error: " in stderr), (i, name, text, stderr)
            assert "Traceback" not in stderr, (i, name, text, stderr)
            assert "unexpected" not in stderr, (i, name, text, stderr)
            codes[name].append(code)
        # What the one lets through, the other does not refuse for its settings.
    assert [p.name for p in tmp_path.iterdir()] == ["run.toml"]
    for found in codes.values():
        assert 0.1 * count < found.count(0) < 0.9 * count
