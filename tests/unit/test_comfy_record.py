"""The record of which ComfyUI the tests passed on, and what the README says of it."""

from __future__ import annotations

from collections import Counter

from tests.comfy import features_table, record


def test_a_run_of_some_files_replaces_only_those():
    first = {"test_a.py": Counter(passed=2), "test_b.py": Counter(passed=1, failed=1)}
    kept = record.add_results({}, "0.8.0", {"torch": "2"}, first)
    assert record.tested_versions(kept, first) == []
    kept = record.add_results(kept, "0.8.0", {}, {"test_b.py": Counter(passed=2, skipped=1)})
    assert kept["0.8.0"]["files"] == {
        "test_a.py": {"passed": 2},
        "test_b.py": {"passed": 2, "skipped": 1},
    }
    assert record.tested_versions(kept, first) == ["0.8.0"]
    assert record.tested_versions(kept, [*first, "test_new.py"]) == []


def test_the_newest_comes_first():
    one = {"files": {"test_a.py": {"passed": 1}}}
    kept = dict.fromkeys(("0.3.64", "0.33.0", "0.8.0"), one)
    assert record.tested_versions(kept, ["test_a.py"]) == ["0.33.0", "0.8.0", "0.3.64"]


def test_the_table_of_features_is_up_to_date():
    assert features_table.DOCS.read_text(encoding="utf-8") == features_table.text()
