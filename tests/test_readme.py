"""What README.md and data/README.md say must be so: their commands, the names in their tables, their files."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

import sample
import train
from transfusion import Config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DATA_README = (ROOT / "data" / "README.md").read_text()
BOTH = README + DATA_README
COMMANDS = re.findall(r"python (train|sample)\.py([^\n`&|#)]*)", BOTH)
NAMES = [f.name.replace("_", "-") for f in (*fields(Config), *fields(train.Run))]
FIELDS = ["--" + name for name in NAMES] + ["--no-" + name for name in NAMES]

def sample_options(capsys):
    with pytest.raises(SystemExit):
        sample.main(["--help"])
    return set(re.findall(r"--[a-z-]+", capsys.readouterr().out))

def test_every_name_in_the_reading_map_is_in_the_file():
    """The tables name functions, not lines: an edit moves lines, and would break such references."""
    tables = README[README.index("## How to read it"):README.index("## Where it departs")]
    source = (ROOT / "transfusion.py").read_text() + "".join(path.read_text() for path in (ROOT / "data").glob("*.py"))
    rows = [line.split("|")[2] for line in tables.splitlines() if line.startswith("| ") and "`" in line]
    names = [name for row in rows for name in re.findall(r"`([A-Za-z_.]+)`", row)]
    assert len(names) >= 20 and "attention_mask" in names
    for name in names:
        last = name.split(".")[-1]
        assert re.search(rf"^\s*(def|class) {last}\b|^{last} =", source, re.MULTILINE), name
    assert not re.search(r"\.py#L\d", BOTH)

def test_every_file_that_is_linked_is_there():
    for text, folder in ((README, ROOT), (DATA_README, ROOT / "data")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (folder / target).exists(), target

def test_every_option_that_is_mentioned_exists(capsys):
    options = {"train": {"--help", "--resume", "--eval-only", "--preset", *FIELDS}, "sample": sample_options(capsys)}
    assert len(COMMANDS) >= 6
    for script, words in COMMANDS:
        assert set(re.findall(r"--[a-z-]+", words)) <= options[script], (script, words)
    assert set(re.findall(r"(?<=[ `])--[a-z]+(?:-[a-z]+)*(?!-)\b", BOTH)) <= options["train"] | options["sample"]

def test_the_training_commands_parse():
    words = [words for script, words in COMMANDS if script == "train" and "--help" not in words]
    assert len(words) >= 10
    for options in words:
        train.parse_options(options.split())

def test_every_row_of_results_names_the_command_that_made_it():
    rows = [line for line in DATA_README.splitlines() if line.startswith("|") and "`python train.py" in line]
    for switch in ("`python train.py`", "--no-bidirectional", "--model chameleon"):
        assert any(switch in row for row in rows), switch
    for row in rows:
        assert len(re.findall(r"\| *[0-9.]+ *(?=\|)", row)) >= 2, row

def test_the_example_in_the_readme_runs():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    names = {}
    exec(code.replace("steps=25", "steps=2"), names)
    assert names["loss"].item() > 0 and names["documents"][0][0].startswith("a red circle.")

def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120

def test_ci_runs_the_commands_of_the_readme():
    ci = (ROOT / ".ci" / "run").read_text()
    for command in ("pip install -q -r requirements.txt pytest ruff", "ruff check .", "python -m pytest"):
        assert command in ci and command in README
    assert "bash .ci/run" in (ROOT / ".github" / "workflows" / "tests.yml").read_text()

def test_the_readme_names_what_a_run_writes():
    for name in ("figure.png", "progress.png", "log.csv", "metrics.json", "ckpt.pt"):
        assert name in README and name in (ROOT / "train.py").read_text()
