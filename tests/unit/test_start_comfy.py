"""`make comfy`, with a server of ten lines in the place of ComfyUI."""

from __future__ import annotations

import json
import socket

import pytest

from recipes import start_comfy

FAKE = """
import http.server, json, pathlib, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
pathlib.Path("started.json").write_text(json.dumps(sys.argv[1:]))
http.server.HTTPServer(("127.0.0.1", port), Handler).handle_request()
sys.exit(7)
"""


@pytest.fixture
def comfyui(tmp_path, monkeypatch):
    """A folder that looks like a ComfyUI; its server ends with 7 after one request."""
    folder = tmp_path / "ComfyUI"
    (folder / "custom_nodes").mkdir(parents=True)
    (folder / "input").mkdir()
    (folder / "main.py").write_text(FAKE)
    monkeypatch.setenv("COMFYUI_PATH", str(folder))
    return folder


def test_it_links_the_pack_writes_the_inputs_and_opens_the_template(comfyui, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(start_comfy.webbrowser, "open", opened.append)
    monkeypatch.setattr(start_comfy, "has_gpu", lambda python: False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert start_comfy.main(["--port", str(port)]) == 7
    words = json.loads((comfyui / "started.json").read_text())
    used = int(words[words.index("--port") + 1])
    assert used > port and "--cpu" in words
    link = comfyui / "custom_nodes" / "stylemaster"
    assert link.resolve() == start_comfy.PACK
    assert opened == [f"http://127.0.0.1:{used}/?template=tiny_video_to_video&source=stylemaster"]
    assert opened[0] in capsys.readouterr().out
    assert (start_comfy.PACK / "workflows" / f"{start_comfy.TEMPLATE}.json").is_file()
    api = json.loads((start_comfy.PACK / f"workflows/api/{start_comfy.TEMPLATE}.json").read_text())
    values = [value for node in api.values() for value in node["inputs"].values()]
    named = {value for value in values if str(value).endswith((".png", ".mp4"))}
    assert named and all((comfyui / "input" / name).is_file() for name in named)


def test_a_pack_that_is_there_already_is_taken(comfyui):
    (comfyui / "custom_nodes" / "my-copy").symlink_to(start_comfy.PACK)
    assert start_comfy.link_pack(comfyui) == "my-copy"
    assert not (comfyui / "custom_nodes" / "stylemaster").exists()


def test_another_pack_of_that_name_is_left_alone(comfyui):
    (comfyui / "custom_nodes" / "stylemaster").mkdir()
    with pytest.raises(SystemExit, match="another copy"):
        start_comfy.link_pack(comfyui)


def test_a_wrong_path_is_named_and_nothing_is_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    monkeypatch.setattr(start_comfy, "install_comfyui", lambda: pytest.fail("installed"))
    with pytest.raises(SystemExit, match="holds no ComfyUI"):
        start_comfy.main([])


def test_without_one_it_is_installed_by_comfy_cli(tmp_path, monkeypatch, capsys):
    folder, commands = tmp_path / "ComfyUI", []
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(start_comfy, "DEFAULT", folder)

    def fake_run(command, check):
        commands.append([str(word) for word in command])
        if "install" in command[1:] and "pip" not in command:
            (folder / "custom_nodes").mkdir(parents=True)
            (folder / "main.py").touch()

    monkeypatch.setattr(start_comfy.subprocess, "run", fake_run)
    assert start_comfy.find_comfyui() is None
    assert start_comfy.install_comfyui() == folder
    assert "Installing" in capsys.readouterr().out
    assert "comfy-cli" in commands[0]
    assert str(folder) in commands[1] and "--skip-prompt" in commands[1]
