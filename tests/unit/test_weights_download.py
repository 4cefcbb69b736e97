"""Downloads and the command line, against a server on this machine that can misbehave."""

import argparse
import hashlib
import http.server
import json
import logging
import os
import shutil
import threading
from dataclasses import replace

import pytest

from stylemaster_core.cli import weights as cli
from stylemaster_core.errors import ConfigError, DiskError, WeightsError
from stylemaster_core.weights import manifest
from stylemaster_core.weights.download import download, noted_sha256, published_facts
from stylemaster_core.weights.manifest import load_manifest

DATA = bytes(range(256)) * 12_000  # 3 MB
SHA256 = hashlib.sha256(DATA).hexdigest()


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers like the hub: a HEAD that redirects and tells size and hash, a GET that redirects."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.server.requests.append(("HEAD", self.path, None))
        if self.server.loops:
            return self.redirect(self.path)
        if self.path.startswith("/old/"):
            return self.redirect("/team/" + self.path.removeprefix("/old/"))
        if self.server.refuse:
            return self.plain(self.server.refuse)
        if self.path.startswith("/cdn/"):
            self.send_response(200)
            self.send_header("Content-Length", str(len(DATA)))
            return self.end_headers()
        self.send_response(302)
        self.send_header("Location", "/cdn/file")
        if self.server.publishes:
            self.send_header("X-Linked-Size", str(len(DATA)))
            self.send_header("X-Linked-ETag", f'"{self.server.published_sha256}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.requests.append(("GET", self.path, asked))
        if self.path.startswith("/old/"):
            return self.redirect("/team/" + self.path.removeprefix("/old/"))
        if self.server.refuse:
            return self.plain(self.server.refuse)
        if not self.path.startswith("/cdn/"):
            return self.redirect("/cdn/file")
        data, start = self.server.data, 0
        if asked and self.server.ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(data):
                return self.plain(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        body = data[start:]
        if self.server.drops > 0:
            self.server.drops -= 1
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(body)

    def redirect(self, where):
        self.send_response(307)
        self.send_header("Location", where)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def plain(self, code):
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub(monkeypatch):
    # A proxy of the environment must not stand between the test and its server.
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.data, server.published_sha256, server.requests = DATA, SHA256, []
    server.ranges, server.publishes, server.drops, server.refuse = True, True, 0, None
    server.loops = False
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def entry():
    return replace(
        load_manifest()["wan-vae"],
        repository="team/model",
        file="split/my file.safetensors",
        size=len(DATA),
        sha256=SHA256,
        sha256_source="official",
    )


def fetch(entry, tmp_path, hub, **options):
    return download(entry, tmp_path, endpoint=hub.url, pause_s=0.01, **options)


def gets(hub):
    return [asked for method, path, asked in hub.requests if method == "GET" and "cdn" in path]


def files_in(tmp_path):
    return sorted(os.listdir(tmp_path / "vae")) if (tmp_path / "vae").exists() else []


def test_download_verifies_and_notes_the_hash(tmp_path, hub, entry):
    seen = []
    result = fetch(entry, tmp_path, hub, progress=lambda *facts: seen.append(facts))
    assert result.path == tmp_path / "vae" / "my file.safetensors"
    assert result.path.read_bytes() == DATA
    assert (result.sha256, result.size) == (SHA256, len(DATA))
    assert result.checked_against == "manifest" and not result.was_present
    assert files_in(tmp_path) == ["my file.safetensors", "my file.safetensors.sha256"]
    assert noted_sha256(result.path) == SHA256
    assert seen[-1] == (len(DATA), len(DATA)) and len(seen) > 1
    # Everything needed stood in the manifest, so the hub was not asked for it.
    assert [method for method, _, _ in hub.requests] == ["GET", "GET"]
    assert "/team/model/resolve/main/split/my%20file.safetensors" in hub.requests[0][1]


def test_a_verified_file_is_not_fetched_again(tmp_path, hub, entry):
    fetch(entry, tmp_path, hub)
    hub.requests.clear()
    assert fetch(entry, tmp_path, hub).was_present
    assert hub.requests == []


def test_the_hub_tells_what_the_manifest_does_not_know(tmp_path, hub, entry):
    unknown = replace(entry, size=None, sha256=None, sha256_source=None, repository="old/model")
    assert published_facts(unknown, hub.url) == (len(DATA), SHA256)
    # Moved repositories redirect first; the file itself is not fetched for its facts.
    assert [method for method, _, _ in hub.requests] == ["HEAD", "HEAD"]
    result = fetch(unknown, tmp_path, hub)
    assert result.checked_against == "hub" and result.sha256 == SHA256
    assert fetch(unknown, tmp_path, hub).was_present


def test_the_hub_outranks_a_mirror_and_the_difference_is_logged(tmp_path, hub, entry, caplog):
    mirrored = replace(entry, sha256="0" * 64, sha256_source="mirror")
    with caplog.at_level(logging.WARNING, logger="stylemaster"):
        assert fetch(mirrored, tmp_path, hub).checked_against == "hub"
    assert "read from a mirror" in caplog.text


def test_without_a_published_hash_the_mirrors_counts(tmp_path, hub, entry):
    hub.publishes = False
    with pytest.raises(WeightsError, match="not the published file"):
        fetch(replace(entry, sha256="0" * 64, sha256_source="mirror"), tmp_path, hub)
    unknown = replace(entry, size=None, sha256=None, sha256_source=None)
    assert fetch(unknown, tmp_path, hub).checked_against == "nothing"


def test_a_broken_connection_is_taken_up_again(tmp_path, hub, entry):
    hub.drops = 2
    assert fetch(entry, tmp_path, hub).sha256 == SHA256
    half = len(DATA) // 2
    assert gets(hub) == [None, f"bytes={half}-", f"bytes={half + half // 2}-"]


def test_a_connection_that_stays_broken_keeps_the_part_for_later(tmp_path, hub, entry):
    hub.drops = 2
    with pytest.raises(WeightsError, match="resumed"):
        fetch(entry, tmp_path, hub, attempts=2)
    assert files_in(tmp_path) == ["my file.safetensors.part"]
    part = (tmp_path / "vae" / "my file.safetensors.part").read_bytes()
    assert DATA.startswith(part) and len(part) > len(DATA) // 2
    assert fetch(entry, tmp_path, hub).sha256 == SHA256
    assert gets(hub)[-1] == f"bytes={len(part)}-"


def test_a_server_without_ranges_starts_over(tmp_path, hub, entry):
    hub.ranges, hub.drops = False, 1
    assert fetch(entry, tmp_path, hub).sha256 == SHA256


def test_a_part_that_is_too_long_or_complete(tmp_path, hub, entry):
    (tmp_path / "vae").mkdir()
    part = tmp_path / "vae" / "my file.safetensors.part"
    part.write_bytes(DATA + b"more")
    assert fetch(entry, tmp_path, hub).sha256 == SHA256
    (tmp_path / "vae" / "my file.safetensors").unlink()
    part.write_bytes(DATA)
    hub.requests.clear()
    assert fetch(entry, tmp_path, hub).sha256 == SHA256
    assert hub.requests == []


def test_a_foreign_part_of_unknown_size_is_dropped(tmp_path, hub, entry):
    hub.publishes = False
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "my file.safetensors.part").write_bytes(DATA + b"more")
    assert fetch(replace(entry, size=None), tmp_path, hub).sha256 == SHA256


@pytest.mark.parametrize("wrong", [DATA[:-1] + b"x", DATA + b"x", b"x" * len(DATA)])
def test_wrong_bytes_are_deleted(tmp_path, hub, entry, wrong):
    hub.data = wrong
    with pytest.raises(WeightsError, match="not the published file") as caught:
        fetch(entry, tmp_path, hub)
    assert SHA256 in str(caught.value)
    assert files_in(tmp_path) == []


def test_a_different_file_is_not_overwritten_unless_asked(tmp_path, hub, entry):
    (tmp_path / "vae").mkdir()
    target = tmp_path / "vae" / "my file.safetensors"
    for other in (b"precious", b"y" * len(DATA)):
        target.write_bytes(other)
        with pytest.raises(WeightsError, match="not overwritten"):
            fetch(entry, tmp_path, hub)
        assert target.read_bytes() == other
    assert hub.requests == []
    assert fetch(entry, tmp_path, hub, overwrite=True).sha256 == SHA256


def test_a_failed_replacement_leaves_the_old_file(tmp_path, hub, entry):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "my file.safetensors").write_bytes(b"precious")
    hub.data = b"x" * len(DATA)
    with pytest.raises(WeightsError, match="not the published file"):
        fetch(entry, tmp_path, hub, overwrite=True)
    assert (tmp_path / "vae" / "my file.safetensors").read_bytes() == b"precious"


def test_a_full_disk_stops_before_the_start(tmp_path, hub, entry, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=len(DATA)))
    with pytest.raises(WeightsError, match="Nothing was fetched"):
        fetch(entry, tmp_path, hub)
    # The size was not in the manifest but on the hub: the same.
    with pytest.raises(WeightsError, match="Nothing was fetched"):
        fetch(replace(entry, size=None), tmp_path, hub)
    assert gets(hub) == [] and files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "words"), [(401, "licence"), (403, "licence"), (404, "may have moved")]
)
def test_refusals_say_what_to_do_and_are_not_repeated(tmp_path, hub, entry, code, words):
    hub.refuse = code
    for one in (entry, replace(entry, sha256=None, sha256_source=None)):
        hub.requests.clear()
        with pytest.raises(WeightsError, match=words):
            fetch(one, tmp_path, hub)
        assert len(hub.requests) == 1


def test_a_server_in_trouble_is_asked_again(tmp_path, hub, entry):
    hub.refuse = 503
    with pytest.raises(WeightsError, match="503"):
        fetch(entry, tmp_path, hub, attempts=3)
    assert len(hub.requests) == 3


def test_no_connection(tmp_path, hub, entry):
    hub.shutdown()
    hub.server_close()
    for one in (entry, replace(entry, sha256=None, sha256_source=None)):
        with pytest.raises(WeightsError, match="could not be fetched"):
            fetch(one, tmp_path, hub, attempts=2)


def test_a_redirect_that_leads_nowhere(tmp_path, hub, entry):
    hub.loops = True
    with pytest.raises(WeightsError, match="answered 307"):
        published_facts(entry, hub.url)


def test_a_whole_repository_is_explained(tmp_path, hub):
    with pytest.raises(WeightsError, match="whole repository"):
        fetch(load_manifest()["deepfloyd-if-1"], tmp_path, hub)


# --- command line -------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, hub, entry, monkeypatch, capsys):
    """Run `stylemaster weights ...` on a manifest of three entries; return code and output."""
    gated = replace(load_manifest()["deepfloyd-if-1"], id="whole")
    entries = {
        e.id: e
        for e in (
            replace(entry, id="main", needed_by=("train",)),
            replace(
                entry,
                id="other",
                save_as="other.safetensors",
                needed_by=("train",),
                alternative_to="main",
                sha256=None,
                sha256_source=None,
            ),
            gated,
        )
    }
    monkeypatch.setattr(manifest, "load_manifest", lambda path=None: entries)
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())

    def call(*words):
        args = parser.parse_args(["weights", *map(str, words)])
        code = args.run(args)
        return code, capsys.readouterr().out

    return call


def test_a_full_disk_is_not_taken_for_the_network(command, tmp_path, hub):
    resource = pytest.importorskip("resource", reason="Windows limits no file sizes")
    where = ("--models-dir", tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(DATA) // 2, before[1]))
    try:
        with pytest.raises(DiskError, match=r"\.part cannot be written: File too large"):
            command("download", "main", *where, "--endpoint", hub.url)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len([path for kind, path, _ in hub.requests if kind == "GET" and "cdn" in path]) == 1
    (part,) = (tmp_path / "vae").glob("*.part")
    assert part.read_bytes() == DATA[: len(DATA) // 2], "what came is kept"
    assert command("download", "main", *where, "--endpoint", hub.url)[0] == 0
    assert [path for kind, _, path in hub.requests][-1] == f"bytes={len(DATA) // 2}-"


def test_cli_download_verify_list(command, tmp_path, hub):
    where = ("--models-dir", tmp_path)
    code, out = command("download", "--for", "train", *where, "--endpoint", hub.url, "--json")
    rows = json.loads(out)
    # The alternative is left out when a task is named.
    assert code == 0 and [row["id"] for row in rows] == ["main"]
    assert rows[0]["sha256"] == SHA256 and rows[0]["checked_against"] == "manifest"

    code, out = command("list", *where, "--json")
    assert [row["present"] for row in json.loads(out)] == [True, False, False]
    code, out = command("list", *where)
    assert "present  main" in out and "absent   other" in out

    code, out = command("verify", *where, "--json")
    assert code == 0
    assert [row["status"] for row in json.loads(out)] == ["ok", "missing", "not checked"]
    assert command("verify", "other", *where)[0] == 1

    (tmp_path / "vae" / "my file.safetensors").write_bytes(b"spoiled")
    code, out = command("verify", "main", *where)
    assert code == 1 and out.startswith("different")
    (tmp_path / "vae" / "my file.safetensors").unlink()
    assert command("verify", *where)[0] == 1, "neither the file nor its alternative is there"
    assert command("verify", "--for", "train", *where)[0] == 1


def test_cli_verifies_against_the_noted_hash(command, tmp_path, hub):
    where = ("--models-dir", tmp_path)
    code, out = command("download", "other", *where, "--endpoint", hub.url)
    assert code == 0 and "hash as the hub publishes it" in out
    assert json.loads(command("verify", "other", *where, "--json")[1])[0]["status"] == "ok"
    (tmp_path / "vae" / "other.safetensors.sha256").unlink()
    row = json.loads(command("verify", "other", *where, "--json")[1])[0]
    assert row["status"] == "no known hash" and row["sha256"] == SHA256


def test_cli_models_folder_of_comfyui(command, tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "ComfyUI"))
    assert str(tmp_path / "ComfyUI" / "models" / "vae") in command("list")[1]
    monkeypatch.delenv("COMFYUI_PATH")
    assert json.loads(command("list", "--json")[1])[0]["path"].startswith("models")


def test_cli_refusals(command):
    with pytest.raises(ConfigError, match="Name files"):
        command("download")
    with pytest.raises(ConfigError, match="no task 'cooking'"):
        command("list", "--for", "cooking")
    with pytest.raises(ConfigError, match="not both"):
        command("download", "main", "--for", "train")
    with pytest.raises(WeightsError, match="Known ids"):
        command("download", "nothing")


def test_cli_convert(command, tmp_path):
    from pathlib import Path

    source = Path(__file__).parents[1] / "golden" / "stylemaster" / "weights_dit_a.safetensors"
    code, out = command("convert", source, "--out", tmp_path, "--dtype", "float16", "--json")
    (row,) = json.loads(out)
    assert code == 0 and row["path"] == str(tmp_path / "weights_dit_a_adapter.safetensors")
    assert row["tensors"] == 61 and "works in all 3 blocks" in row["style_path"]
    code, out = command("convert", source, "--out", tmp_path, "--overwrite", "--include-base")
    assert code == 0 and out.count("wrote ") == 2
    with pytest.raises(WeightsError, match="--overwrite"):
        command("convert", source, "--out", tmp_path)
