"""What is fixed before a fold: effort becomes a count of iterations, and plans of older ledgers are still read."""

from __future__ import annotations

import json

import msgspec
import networks
import pytest
from safetensors.torch import save_file

from foldd.base.store import open_base
from foldd.daemon.cli import main
from foldd.daemon.config import load_config
from foldd.daemon.ledger import Ledger
from foldd.daemon.pace import measure_pace
from foldd.daemon.plan import FAST_ITERATIONS, PACE, PAPER_ITERATIONS, iterations_for, make_plan, read_pace, stored_plan
from foldd.daemon.quantizing import FORMATS, make_quantizer
from foldd.daemon.settings import Fold, Gate, Quantize, Settings


def planned(quantize: Quantize, pace: float | None, **settings) -> dict:
    return make_plan(Settings(quantize=quantize, **settings), "digest", pace)


OLD = {
    "method": "otmf", "options": {"ridge": 1e-3}, "data_free_method": "average", "data_free_options": {}, "seed": 3,
    "threads": 2, "parity": 1e-4, "conflict": 0.5, "on_conflict": "fold", "config_digest": "0" * 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("effort", "pace", "count"),
    [
        ("fast", None, 100), ("fast", 0.01, 100), ("fast", 1.0, 30), ("fast", 45.0, 0), ("paper", None, 20_000),
        ("paper", 10.0, 20_000), (60.0, None, 100), (60.0, 0.5, 120), (0.1, 0.5, 0), (1e9, 0.5, 20_000), (7, 2.0, 3),
    ],
)  # fmt: skip
def test_effort_becomes_a_count(effort, pace, count):
    assert iterations_for(effort, "w4a8", pace) == count
    assert stored_plan(planned(Quantize(format="w4", effort=effort), pace)).iterations == count


def test_fast_rounds_eight_bits_to_the_nearest():
    for form in ("w8a8", "w8"):
        assert iterations_for("fast", form, 0.01) == 0
        assert iterations_for(1.0, form, 0.01) == 100


def test_the_counts_are_those_of_the_documentation():
    assert (FAST_ITERATIONS, PAPER_ITERATIONS) == (100, 20_000)


def test_a_plan_holds_all_that_decides_the_bytes_and_survives_the_ledger(tmp_path):
    quantize = Quantize(format="w4a8", effort=12.0, state="quantized")
    made = planned(quantize, 0.1, fold=Fold(seed=5), gate=Gate(agreement=0.8))
    ledger = Ledger.create(tmp_path / "ledger.sqlite3")
    ledger.add("a" * 64, "a", "folder", 1, 0.5)
    plan = stored_plan(ledger.begin(1, made).plan)
    assert (plan.format, plan.quantizer, plan.iterations, plan.state, plan.agreement, plan.seed) == (
        "w4a8", "hdrq", 120, "quantized", 0.8, 5,
    )  # fmt: skip
    assert "effort" not in made, "seconds decide nothing once they are a count"
    later = planned(Quantize(format="w4a8", effort=24.0), 0.1)
    ledger.retreat(1, refund=True)
    assert stored_plan(ledger.begin(1, later).plan) == plan, "the plan of the first attempt stands"
    ledger.close()


def test_plans_from_before_quantization_are_read():
    plan = stored_plan(OLD)
    assert (plan.format, plan.quantizer, plan.iterations, plan.state) == ("float", "hdrq", 0, "float")
    assert plan.agreement == 0.0
    assert plan.options == {"ridge": 1e-3}


def test_a_plan_with_fields_that_nobody_knows_is_refused():
    with pytest.raises(msgspec.ValidationError):
        stored_plan(OLD | {"formt": "w8"})


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("effort", "published"), [("paper", True), ("fast", False), (3.0, False)])
def test_a_plan_names_the_quantizer(kind, effort, published):
    plan = stored_plan(planned(Quantize(format=kind, effort=effort), None))
    how = make_quantizer(plan, *FORMATS[kind])
    assert (how.weight_bits, how.activation_bits) == (int(kind[1]), 8 if kind.endswith("a8") else None)
    assert (how.noise, how.pull, how.per_channel) == ((True, 0.05, False) if published else (False, 0.0, True))
    assert (0 if how.descent is None else how.descent.iterations) == plan.iterations


def test_no_iterations_is_rounding_to_the_nearest():
    plan = stored_plan(planned(Quantize(format="w8", effort=1.0), 5.0))
    assert make_quantizer(plan, 8, None).descent is None


@pytest.mark.parametrize("text", ["effort = 0", "effort = -3.0", "effort = 'slow'", "format = 'w3a8'", "state = 'w8'"])
def test_what_cannot_be_planned_is_no_configuration(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_text(f"[quantize]\n{text}\n")
    with pytest.raises(Exception, match=r"quantize\." + text.split()[0]):
        load_config(path)


def test_init_measures_the_pace(tmp_path, monkeypatch, capsys):
    """It lies beside the base; measured again, it is a number of the same kind; without it counts are the default."""
    model = networks.residual()
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, tmp_path / "w.safetensors")
    (tmp_path / "config.toml").write_text("")
    assert main([
        "init", "--config", str(tmp_path / "config.toml"), "--base", f"{networks.__file__}:residual", "--weights",
        str(tmp_path / "w.safetensors"), "--input-shape", "1,8,8",
    ]) == 0  # fmt: skip
    base = tmp_path / "state" / "base"
    pace = read_pace(base)
    assert json.loads((base / PACE).read_bytes()) == {"seconds_per_iteration": pace}
    assert 1e-5 < pace < 5
    assert iterations_for(1000 * pace, "w8a8", pace) == pytest.approx(1000, abs=1)
    open_base(base)  # which a strange file does not disturb
    assert 1e-5 < measure_pace(base) < 5
    (base / PACE).unlink()
    assert read_pace(base) is None


def test_measuring_ends_in_time_and_counts_what_is_left(base_folder, tmp_path, monkeypatch):
    """A clock that leaps: after the first block of three the rest is taken in proportion."""
    import shutil

    folder = tmp_path / "base"
    shutil.copytree(base_folder("attention"), folder)
    times = iter([0.0, *(10.0 for _ in range(50))])
    monkeypatch.setattr("foldd.daemon.pace.time.monotonic", lambda: next(times))
    assert measure_pace(folder) == pytest.approx(10.0 * 5)  # one layer of five was done
