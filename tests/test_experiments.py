"""data/experiments.py and data/compare.py, with tiny runs."""

import json
from pathlib import Path

import pytest
from PIL import Image

from data import compare, experiments
from tests.conftest import TINY, call, complaint, metrics_of

def test_experiments_train_what_is_missing_and_print_tables(monkeypatch):
    runs = {"low": " ".join(TINY), "high": " ".join([*TINY, "--lr", "0.02"])}
    rows = {"a low rate": ("low", "as here"), "a high rate": ("high", "")}
    monkeypatch.setattr(experiments, "RUNS", runs)
    monkeypatch.setattr(experiments, "TABLES", {"rates": experiments.Table("Rates", rows)})
    call(experiments.main, "--seeds", 0, 1)
    path = Path("runs/experiments/results.json")
    results = json.loads(path.read_text())
    assert set(results) == {"low-0", "low-1", "high-0", "high-1"}
    values = [results[f"low-{seed}"]["scores"]["text_excess"][0] for seed in (0, 1)]
    assert Image.open("runs/experiments/rates-draw_acc.png").width > 128

    path.write_text(json.dumps({key: results[key] for key in ("low-0", "high-0", "high-1")}))
    written = {p: p.stat().st_mtime_ns for p in Path("runs/experiments").glob("*/ckpt.pt")}
    printed = call(experiments.main, "--seeds", 0, 1)  # takes low-1 from its directory
    assert written == {p: p.stat().st_mtime_ns for p in written}
    assert json.loads(path.read_text()) == results
    (low,) = [line for line in printed.splitlines() if line.startswith("| a low rate |")]
    assert f"{sum(values) / 2:.1f} ± {abs(values[0] - values[1]) / 2**0.5:.1f} |" in low
    assert "as here" in low and low in call(experiments.main, "--show")
    monkeypatch.setitem(runs, "low", "--noise-cap none")
    assert "low-2 failed" in call(experiments.main, "--seeds", 2, "--jobs", 1)

def test_differences_have_the_p_value_of_welch():
    """0.0728 of 20 million draws of Student's t with 5.5 degrees of freedom are beyond 2.21."""
    a, b = [0.99, 0.98, 1.0, 0.97, 0.99], [0.95, 0.99, 0.94, 0.98, 0.93]
    assert experiments.p_value(a, b) == pytest.approx(0.0728, abs=2e-4)
    assert experiments.p_value(a, a) == 1
    assert experiments.mean_and_spread(b, [1.0, 0.99, 1.0, 0.99, 0.98]).endswith(" *")
    assert not experiments.mean_and_spread(a, [1.0, 0.98, 1.0, 0.97, 0.98]).endswith(" *")

def test_runs_are_compared_in_a_table_and_a_picture(trained):
    printed = call(compare.main, trained[0], trained[0])
    assert printed.count(f"{metrics_of(trained[0])['scores']['text_ppl'][0]:.3f}") == 2
    assert "edit_acc" not in printed  # a column that no run has
    assert Image.open("compare.png").width > 12 * 128
    assert "not the output" in complaint(compare.main, ".")
