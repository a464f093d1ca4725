from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from fmdeploy.cli import group
from fmdeploy.errors import DataError
from fmdeploy.plan.fit import fit_law, interval
from fmdeploy.plan.laws import LAWS
from fmdeploy.plan.plan import plan
from fmdeploy.plan.runs import Runs, read_runs

# arXiv:2203.15556, appendix D.3, and arXiv:2001.08361, table 2
CHINCHILLA = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
KAPLAN = {"Nc": 8.8e13, "Dc": 5.4e13, "alpha_N": 0.076, "alpha_D": 0.095}
THETA = {
    "chinchilla": np.array([math.log(1.69), math.log(406.4), math.log(410.7), 0.34, 0.28]),
    "kaplan": np.array([math.log(8.8e13), math.log(5.4e13), 0.076, 0.095]),
}


def runs_of(law: str, noise: float, *, count: int = 60, seed: int = 0) -> Runs:
    """Runs as large as those of the Chinchilla paper, on the law itself but for `noise` in the logarithm."""
    rng = np.random.default_rng(seed)
    params = np.exp(rng.uniform(np.log(4e7), np.log(1.6e10), count))
    tokens = np.exp(rng.uniform(np.log(5e9), np.log(5e11), count))
    log_loss = LAWS[law].log_loss(THETA[law], params, tokens)
    return Runs(params, tokens, np.exp(log_loss + noise * rng.standard_normal(count)))


@pytest.mark.parametrize(("law", "published"), [("chinchilla", CHINCHILLA), ("kaplan", KAPLAN)])
def test_published_numbers_come_back_from_their_own_points(law: str, published: dict[str, float]) -> None:
    fit = fit_law(LAWS[law], runs_of(law, 0.0), draws=0)
    assert fit.rms < 1e-8
    assert LAWS[law].values(fit.theta) == pytest.approx(published, rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_published_numbers_are_inside_the_intervals_with_noise(seed: int) -> None:
    """Five 99 % intervals each; the exponents themselves within 15 %."""
    fit = fit_law(LAWS["chinchilla"], runs_of("chinchilla", 0.005, seed=seed), draws=100)
    found = fit.to_json(0.99)
    assert all(found[name]["low"] < value < found[name]["high"] for name, value in CHINCHILLA.items())
    assert found["alpha"]["value"] == pytest.approx(0.34, rel=0.15)
    assert found["beta"]["value"] == pytest.approx(0.28, rel=0.15)
    assert fit.rms == pytest.approx(0.005, rel=0.4)


def test_intervals_grow_with_the_noise() -> None:
    def width(noise: float) -> float:
        alpha = fit_law(LAWS["chinchilla"], runs_of("chinchilla", noise), draws=60).to_json(0.95)["alpha"]
        return float(alpha["high"] - alpha["low"])

    assert width(1e-4) < width(0.01) / 10


def test_the_optimum_of_gophers_budget_is_the_published_one() -> None:
    """Table A3 of arXiv:2203.15556: 5.76e23 FLOPs, approach 3: 40.2 billion parameters by the unrounded fit."""
    params, tokens = LAWS["chinchilla"].optimum(THETA["chinchilla"], 5.76e23)
    assert 2.8e10 < params < 4.5e10
    assert 6 * params * tokens == pytest.approx(5.76e23)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["chinchilla", "kaplan"]), st.floats(19, 25), st.floats(0.5, 2.0))
def test_no_other_pair_of_the_same_cost_is_better(law: str, log_flops: float, factor: float) -> None:
    flops, theta = 10**log_flops, THETA[law]
    params, tokens = LAWS[law].optimum(theta, flops)
    best = LAWS[law].loss(theta, params, tokens)
    assert LAWS[law].loss(theta, params * factor, tokens / factor) >= best - 1e-9


def test_an_interval_of_too_few_converged_refits_is_not_measured() -> None:
    assert interval(1.0, [1.0] * 7 + [math.nan] * 3, 0.95) == {"value": 1.0, "low": None, "high": None}
    assert interval(1.0, [], 0.95)["low"] is None


def write_csv(path: Path, runs: Runs) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["name", "params", "tokens", "loss"])
        writer.writerows(("run", *row) for row in zip(runs.params, runs.tokens, runs.loss, strict=True))
    return path


def test_the_command_line_prints_the_law_and_the_optimum(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "runs.csv", runs_of("chinchilla", 0.002))
    answer = CliRunner().invoke(group, ["plan", "--fit", str(path), "--flops", "5.76e23", "--draws", "40", "--json"])
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    for name, value in CHINCHILLA.items():
        assert set(found[name]) == {"value", "low", "high"}
        assert found[name]["value"] == pytest.approx(value, rel=0.6)
    assert found["optimal"]["params"]["low"] < found["optimal"]["params"]["value"] < found["optimal"]["params"]["high"]
    assert 6 * found["optimal"]["params"]["value"] * found["optimal"]["tokens"]["value"] == pytest.approx(5.76e23)
    assert plan(fit=path, flops=5.76e23, draws=40).data == found  # the same seed, the same draws


def grid_of_runs(grows: str) -> Runs:
    """Sixteen runs whose loss grows with one of the two and falls with the other."""
    params, tokens = (x.ravel() for x in np.meshgrid(np.geomspace(1e6, 1e8, 4), np.geomspace(1e8, 1e10, 4)))
    falling = {"params": 410 / tokens**0.28, "tokens": 406 / params**0.34}
    growing = {"params": 0.1 * np.log(params / 1e6), "tokens": 0.1 * np.log(tokens / 1e8)}
    return Runs(params, tokens, 1.7 + falling[grows] + growing[grows])


@pytest.mark.parametrize(("law", "grows"), [("chinchilla", "params"), ("kaplan", "tokens")])
def test_a_loss_that_rises_with_size_has_no_law_and_no_best_size(tmp_path: Path, law: str, grows: str) -> None:
    path = write_csv(tmp_path / "runs.csv", grid_of_runs(grows))
    with pytest.raises(DataError, match=rf"does not fall with {grows}: .*found \+\d\.\d\d% for each doubling") as caught:
        plan(fit=path, flops=1e19, law=law)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [
    ("", "no column 'params'"),
    ("params,tokens\n1,2\n", "no column 'loss'"),
    ("params,tokens,loss,loss\n1,2,3,4\n", "two columns 'loss'"),
    ("params,tokens,loss\n1," + "9" * 400 + ",3\n", r"found 9{40}\)"),
    ("params,tokens,loss\n1,2,3\n", "too few runs"),
    ("params,tokens,loss\n1,2,x\n", "line 2: loss is not a number above 0"),
    ("params,tokens,loss\n1,-2,3\n", "line 2: tokens is not a number above 0"),
    ("params,tokens,loss\n1,2\n", "line 2: loss is not a number above 0"),
    ("params,tokens,loss\n" + "7,2,3\n" * 9, "do not differ enough in params"),
    ("params,tokens,loss\n" + "".join(f"{k},2,3\n" for k in range(1, 9)), "do not differ enough in tokens"),
])
def test_a_bad_table_is_told_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "runs.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_runs(tmp_path / "runs.csv")


def test_a_binary_file_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match="not a CSV file"):
        read_runs(tmp_path / "runs.csv")


def test_a_table_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_runs(tmp_path / "runs.csv")
