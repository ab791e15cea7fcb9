"""The planted faults fit the source as it is now (tests/mutants.py)."""

from collections import Counter

from mutants import FAULTS, ROOT


def test_every_fault_stands_once_in_its_file() -> None:
    texts = {fault.file: (ROOT / fault.file).read_text(encoding="utf-8") for fault in FAULTS}
    stale = [(f.file, f.old) for f in FAULTS if texts[f.file].count(f.old) != 1]
    assert not stale


def test_no_fault_is_planted_twice_or_changes_nothing() -> None:
    assert all(fault.old != fault.new for fault in FAULTS)
    twice = [key for key, n in Counter((f.file, f.old, f.new) for f in FAULTS).items() if n > 1]
    assert not twice
