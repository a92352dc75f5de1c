"""What README.md and data/README.md say must be so: their commands, the names in their tables, their files."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

import sample
import train
from data import experiments
from transfusion import Config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DATA_README = (ROOT / "data" / "README.md").read_text()
BOTH = README + DATA_README
COMMANDS = re.findall(r"python (train|sample)\.py([^\n`&|#)]*)", BOTH)
NAMES = [f.name.replace("_", "-") for f in (*fields(Config), *fields(train.Run))]
FIELDS = ["--" + name for name in NAMES] + ["--no-" + name for name in NAMES]

TORCHRUN_OPTIONS = {"--standalone", "--nproc-per-node"}

def options_of(main, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    return set(re.findall(r"--[a-z-]+", capsys.readouterr().out))

def test_every_name_in_the_reading_map_is_in_the_file():
    """The tables name functions, not lines: an edit moves lines, and would break such references."""
    tables = README[README.index("## How to read it"):README.index("## Differences from the paper")]
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
    of_train = {"--help", "--resume", "--eval-only", "--preset", *FIELDS}
    options = {"train": of_train, "sample": options_of(sample.main, capsys)}
    assert len(COMMANDS) >= 6
    for script, words in COMMANDS:
        assert set(re.findall(r"--[a-z-]+", words)) <= options[script], (script, words)
    mentioned = set(re.findall(r"(?<=[ `])--[a-z]+(?:-[a-z]+)*(?!-)\b", BOTH))
    others = options_of(experiments.main, capsys) | TORCHRUN_OPTIONS
    assert mentioned <= options["train"] | options["sample"] | others

def test_the_training_commands_parse():
    words = [words for script, words in COMMANDS if script == "train" and "--help" not in words]
    assert len(words) >= 6
    for options in words:
        train.parse_options(options.split())

def test_the_tables_are_those_that_the_command_prints_from_the_collected_results():
    results = json.loads((ROOT / "data" / "results.json").read_text())
    shown = 0
    for name, table in experiments.TABLES.items():
        rows = experiments.markdown(table, results).splitlines()
        if len(rows) > 3:  # a table of one row compares nothing
            assert "\n".join(rows) in DATA_README, name
            assert experiments.parity_markdown(table, results) in DATA_README, name
            shown += 1
    assert shown >= 4
    of_seeds = [results[f"default-{seed}"]["scores"] for seed in (0, 1, 2)]
    for score in ("draw_acc", "caption_acc", "text_ppl", "frechet"):
        assert " / ".join(f"{scores[score][0]:.3f}" for scores in of_seeds) in README, score
        of_chameleon = [result["scores"][score][0] for result in experiments.results_of(results, "chameleon")]
        assert f"| {experiments.mean_and_range(of_chameleon)} |" in README, score

def test_the_options_of_all_experiments_work():
    for options in experiments.RUNS.values():
        given = train.parse_options(options.split())
        train.check_options(given)
        train.Run(**{name: value for name, value in given.items() if name in train.Run.__dataclass_fields__})
    for table in experiments.TABLES.values():
        runs = {run for run, _ in table.rows.values()}
        assert runs <= set(experiments.RUNS) and {run for pair in table.parity for run in pair} <= runs
        assert set(table.curves) <= set(experiments.CURVES)

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
