"""What the README says must be so: its commands, its references to lines, its figure."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

import sample
import train
from transfusion import Config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"python (train|sample)\.py([^\n`&|#)]*)", README)
FIELDS = [start + f.name.replace("_", "-") for f in (*fields(Config), *fields(train.Run)) for start in ("--", "--no-")]
OPTIONS = {"train": {"--help", "--resume", "--eval-only", "--preset", *FIELDS},
           "sample": {"--run", "--out", "--steps", "--cfg-scale", "--sampler", "--temperature", "--seed", "--help"}}

def test_every_reference_points_at_what_it_names():
    references = re.findall(r"\[`(\w+)`\]\((\w+(?:/\w+)?\.py)#L(\d+)\)", README)
    assert len(references) >= 10
    for name, file, line in references:
        text = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"\s*(def|class) {name}\b|{name}\b", text), f"{file}:{line} is {text!r}, not {name}"

def test_every_file_that_is_linked_is_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target

def test_every_option_that_is_mentioned_exists():
    assert len(COMMANDS) >= 6
    for script, words in COMMANDS:
        assert set(re.findall(r"--[a-z-]+", words)) <= OPTIONS[script], (script, words)
    assert set(re.findall(r"(?<=[ `])--[a-z-]+", README)) <= OPTIONS["train"] | OPTIONS["sample"]

def test_the_training_options_in_the_text_and_the_tables_parse():
    named = re.findall(r"`(--[a-z-]+ [^`]*)`", README)
    assert len(named) >= 5
    for options in named + [words for script, words in COMMANDS if script == "train" and "--help" not in words]:
        train.parse_options(options.split())

def test_every_comparison_names_the_command_that_made_it():
    rows = [line for line in README.splitlines() if line.startswith("|") and "`python train.py" in line]
    for switch in ("`python train.py`", "--no-bidirectional", "--model chameleon"):
        assert any(switch in row for row in rows), switch
    for row in rows:
        assert len([cell for cell in row.split("|")[3:] if re.fullmatch(r" *[0-9.]+ *", cell)]) >= 2, row

def test_ci_runs_the_readmes_test_line():
    ci = (ROOT / ".ci" / "run").read_text()
    for command in ("pip install -q -r requirements.txt pytest ruff", "ruff check .", "python -m pytest"):
        assert command in ci and command in README

def test_the_first_screen_names_what_a_run_writes(capsys):
    for name in ("figure.png", "progress.png", "log.csv", "metrics.json"):
        assert name in README and name in (ROOT / "train.py").read_text()
    with pytest.raises(SystemExit):
        sample.main(["--help"])
    assert "python sample.py" in capsys.readouterr().out
