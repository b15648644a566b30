"""A short run of tests/lab/fuzz.py."""
from lab.fuzz import fuzz


def test_broken_files_and_nonsense_flags_are_refused_in_one_line_or_read_as_what_they_say():
    counts, wrong = fuzz(180, 1)
    assert not wrong, "\n".join(wrong)
    assert sum(counts.values()) == 180 and counts["clear"] > 90 and counts["read"] > 10
