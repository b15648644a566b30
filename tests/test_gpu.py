"""Claims about tests/lab/gpu.py: its small mode goes through all rows; a bad row is reported."""
import json
import sys

import pytest

from conftest import run_script
from lab import gpu


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What the small mode writes to --json, and its exit status."""
    rows = tmp_path_factory.mktemp("gpu") / "rows.json"
    status, output = run_script("gpu.py", "--device", "cpu", "--small", "--json", rows)
    assert rows.exists(), output
    return json.loads(rows.read_text()) | {"status": status}


def test_every_row_runs_on_the_cpu_or_says_what_it_needs(report):
    assert list(report["rows"]) == list(gpu.ROWS)
    for name, row in report["rows"].items():
        assert row["status"] in ("passed", "skipped"), f"{name}: {row}"
        if row["status"] == "skipped":
            assert row["reason"] in ("needs CUDA", "no --peers FILE")
    assert report["status"] == 0
    assert report["machine"]["card"] == "cpu" and report["machine"]["commit"]


def test_claims_that_hold_on_the_cpu_hold_to_the_bit(report):
    rows = report["rows"]
    for name in gpu.AGREE:
        assert rows[name]["loss_error"] == rows[name]["feature_error"] == 0
    assert rows["resume"]["softcon_same_bits"] and rows["resume"]["pera_same_bits"]
    assert rows["batches"]["batches"] > 0 and rows["batches"]["wrong"] == 0
    assert "has no GPU" in rows["ranks"]["line"]


def test_steps_say_their_speed_their_operations_and_where_the_time_goes(report):
    for name in gpu.STEPS:
        row = report["rows"][name]
        for number in ("images_per_s", "tflop", "of_the_product", "augment", "loss", "optimise"):
            assert row[number] > 0, f"{name}: {number}"
        assert row["tflop_per_s"] == pytest.approx(row["tflop"] / row["step_ms"] * 1000)


def test_the_loop_reads_a_pack_in_each_way(report):
    row = report["rows"]["loader"]
    for way in ("in place", "thread", "1 process"):
        assert row[f"{way}: images_per_s"] > 0 and 0 <= row[f"{way}: data_wait"] <= 1


def test_a_row_that_crashes_or_takes_too_long_says_so():
    crash = gpu.run_apart([sys.executable, "-c", "raise ValueError('no such kernel')"], 60)
    assert crash == {"status": "failed",
                     "reason": "exit status 1: ValueError: no such kernel"}
    slow = gpu.run_apart([sys.executable, "-c", "import time; time.sleep(60)"], 1)
    assert slow["status"] == "failed" and slow["reason"].startswith("longer than 1 s")


def test_a_failed_row_fails_the_call_and_its_reason_is_printed(monkeypatch, capsys):
    def broken(options):
        raise RuntimeError("device-side assert")
    monkeypatch.setitem(gpu.ROWS, "batches", broken)
    assert gpu.main(["--device", "cpu", "--small", "--rows", "batches"]) == 1
    assert "RuntimeError: device-side assert" in capsys.readouterr().out.splitlines()[-1]


def test_rows_that_the_time_does_not_reach_are_left_out(capsys):
    assert gpu.main(["--device", "cpu", "--small", "--rows", "batches", "--minutes", "0"]) == 0
    assert "no time left" in capsys.readouterr().out


def test_without_a_gpu_the_script_says_so_in_one_line(capsys):
    if gpu.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "there is no GPU" in capsys.readouterr().err
