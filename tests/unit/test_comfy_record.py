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


def test_the_readme_says_what_ran_and_what_failed():
    files = {"test_a.py": {"passed": 1}, "test_b.py": {"failed": 1}, "test_gone.py": {"failed": 1}}
    kept = {"0.8.0": {"files": {}}, "0.33.0": {"files": files}}
    assert record.sentence(kept, ["test_a.py", "test_b.py", "test_c.py"]) == (
        "Tested on ComfyUI 0.33.0 (2 of 3 test files, 1 with failures), "
        "0.8.0 (0 of 3 test files, none with failures).\n"
    )
    readme = record.README.read_text(encoding="utf-8")
    said = record.sentence(record.read(), record.test_files())
    assert record.SENTENCE.findall(readme) == [said], "python -m tests.comfy.record writes it"


def test_the_readmes_sentence_is_written_with_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RECORD", tmp_path / "docs" / "tested.json")
    monkeypatch.setattr(record, "README", tmp_path / "README.md")
    record.README.write_text("a\nTested on ComfyUI 0.1.0.\nb\n")
    record.write({"0.8.0": {"files": {}}})
    written = record.README.read_text()
    assert written == f"a\n{record.sentence(record.read(), record.test_files())}b\n"


def test_the_table_of_features_is_up_to_date():
    assert features_table.DOCS.read_text(encoding="utf-8") == features_table.text()
