import pytest

from ddim_cli.config.lines import key_lines

TEXT = '''# comment with [brackets] and = signs
title = """
[not.a.table]
steps = 1
"""
[sampling] # here
steps = 5 # "quoted
"eta" = 0.5
seeds = [
  1, # ]
  2,
]
scheduler.beta_start = 0.1
[ "scheduler" ]
prediction_type = 'x = ['
inline = { a = 1, b = "}" }
[[sweep]]
x = 1
[[sweep]]
x = 2
'''


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("title",), 2),
        (("sampling",), 6),
        (("sampling", "steps"), 7),
        (("sampling", "eta"), 8),
        (("sampling", "seeds"), 9),
        (("sampling", "scheduler", "beta_start"), 13),
        (("scheduler", "prediction_type"), 15),
        (("scheduler", "inline", "b"), 16),
        (("sweep", "x"), None),
        (("missing",), None),
    ],
)
def test_line_of_a_key(path, line, newline):
    assert key_lines(TEXT.replace("\n", newline)).line_of(path) == line


def test_a_table_over_several_lines_names_no_line():
    # TOML 1.1 lets an inline table span lines; a 1.0 parser would have refused the text before.
    assert key_lines("a = {\n x = 1,\n y = 2 }\n").line_of(("a", "y")) is None


def test_strings_that_end_in_quotes():
    text = 'a = """x"""""\nb = 1\nc = "\\"#"\nd = 2\n'
    lines = key_lines(text)
    assert (lines.line_of(("b",)), lines.line_of(("d",))) == (2, 4)


@pytest.mark.parametrize("text", ["[sampling]\n\nsteps.x = 1\n", "[sampling]\n\n[sampling.steps.x]\n"])
def test_the_line_that_makes_a_table_of_a_key(text):
    assert key_lines(text).line_of(("sampling", "steps")) == 3


def test_a_key_that_has_no_statement_is_not_where_its_table_is():
    assert key_lines("[sampling]\nsteps = 1\n").line_of(("sampling", "eta")) is None
