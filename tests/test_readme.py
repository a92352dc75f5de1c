"""What README.md and data/README.md say must be so: their commands, names, links and code."""

import json
import re
from collections import defaultdict
from dataclasses import fields

import numpy as np

import train
import transfusion
from data import experiments, shapes, tasks
from tests.conftest import ROOT

PAGES = {path: path.read_text() for path in (ROOT / "README.md", ROOT / "data" / "README.md")}
README = PAGES[ROOT / "README.md"]

def test_commands_that_train_have_options_that_exist():
    commands = re.findall(r"python train\.py([^\n`#|]*)", "".join(PAGES.values()))
    assert len(commands) > 5
    for options in [*commands, *experiments.RUNS.values()]:
        if "..." not in options:
            given = train.parse_options(options.split())
            train.build(train.Run, given)
            train.build(transfusion.Config, given)

def test_every_option_that_is_named_exists():
    known = {f.name for kind in (transfusion.Config, train.Run) for f in fields(kind)}
    known |= {"help", "standalone", "nproc_per_node"}
    source = "".join((ROOT / name).read_text() for name in ("sample.py", "train.py"))
    source += (ROOT / "data" / "experiments.py").read_text()
    for page in PAGES.values():
        for option in set(re.findall(r"(?<=[ `])--([a-z]+(?:-[a-z]+)*)(?!-)\b", page)):
            name = option.removeprefix("no-").replace("-", "_")
            assert name in known or f'"--{option}"' in source, option

def test_every_name_in_the_tables_is_in_the_code():
    tables = README[README.index("## Read it"):README.index("## Differences")]
    names = [name for line in tables.splitlines() if line.startswith("|")
             for name in re.findall(r"`([A-Za-z_.0-9]+)`", line)]
    assert len(names) > 20
    for name in names:
        owners = [transfusion, train, shapes, tasks]
        for part in name.split("."):
            owners = [getattr(owner, part) for owner in owners if hasattr(owner, part)]
        assert owners, name

def test_links_lead_somewhere():
    for path, page in PAGES.items():
        for target in re.findall(r"\]\((?!http)([^)#]+)", page):
            assert (path.parent / target).exists(), target

RESULTS = json.loads((ROOT / "data" / "results.json").read_text())

def test_the_tables_are_those_of_the_committed_results():
    page = PAGES[ROOT / "data" / "README.md"]
    for table in experiments.TABLES.values():
        assert experiments.table_of(table, RESULTS) in page, table.title

def test_every_score_on_the_pages_has_a_committed_result():
    """A score has three or four decimals. It is of one run, or the mean over the seeds."""
    values, texts = defaultdict(list), ""
    for key, result in RESULTS.items():
        for name, (value, beside) in result["scores"].items():
            values[key.rpartition("-")[0], name].append(value)
            texts += beside + " "
        for name, curve in result["curves"].items():
            values[key, name] += curve
    numbers = [number for seeds in values.values() for number in [*seeds, np.mean(seeds)]]
    numbers += map(float, re.findall(r"\d+\.\d+", texts))
    known = {f"{number:.{digits}f}" for number in numbers for digits in (3, 4)}
    for path, page in PAGES.items():
        for table in experiments.TABLES.values():
            page = page.replace(experiments.table_of(table, RESULTS), "")
        unknown = set(re.findall(r"(?<![\d.])\d+\.\d{3,4}(?![\d.])", page)) - known
        assert not unknown, path

def test_the_example_runs():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    names = {}
    exec(code.replace("steps=25", "steps=2"), names)
    assert names["loss"].item() > 0 and len(names["documents"]) == 1
