"""A short run of tests/lab/fuzz.py."""
import json

from conftest import run_script


def test_broken_files_and_nonsense_flags_are_refused_in_one_line_or_read_as_what_they_say():
    status, output = run_script("fuzz.py", "--cases", 180, "--seed", 1)
    assert status == 0, output
    counts = json.loads(output.splitlines()[-1])
    assert counts["wrong"] == 0 and sum(counts.values()) == 180
    # most are refused; some harm leaves a file that is still valid
    assert counts["clear"] > 90 and counts["read"] > 10
