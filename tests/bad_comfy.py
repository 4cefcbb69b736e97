"""Everything that a server may do wrong, each case by its name: "endpoint/what".

A server of a case does one thing wrong at one endpoint, and is a good ComfyUI otherwise.
"""

import base64
import contextlib
import hashlib
import json
import random
import struct
import time
import urllib.parse

from tests.fake_comfy import FakeComfy

ENDPOINTS = ("queue", "features", "upload", "prompt", "history", "view")
_ANSI = "\x1b[31m\x1b]0;owned\x07\u202e"
# Bodies of an answer with status 200 that no ComfyUI sends.
BODIES = {
    "null": b"null",
    "number": b"7",
    "text": b'"x"',
    "list": b"[]",
    "nested-list": b"[[[]]]",
    "empty-object": b"{}",
    "other-object": b'{"a": {"b": [1, null]}}',
    "true": b"true",
    "nan": b"NaN",
    "huge-number": b'{"prompt_id": 1' + b"0" * 400 + b"}",
    "deep-list": b"[" * 200_000,
    "deep-object": b'{"a":' * 100_000,
    "deep-known": b'{"queue_running":' + b"[" * 200_000,
    "half": b'{"queue_running": [',
    "no-utf8": b'{"prompt_id": "\xff\xfe"}',
    "surrogate": b'{"prompt_id": "\\ud800", "name": "\\udfff"}',
    "nul": b'{"prompt_id": "\\u0000", "name": "\\u0000"}',
    "html": b"<html><body>Sign in</body></html>",
    "empty": b"",
    "ansi": (_ANSI * 9000).encode(),
    "bom": b"\xef\xbb\xbf{}",
    "utf16": '{"a": 1}'.encode("utf-16"),
}
VALUES = {"null": None, "number": 7, "text": "x", "list": [1, [None]], "object": {"a": None}}
# Statuses with what goes along.
STATUSES = {
    "301": (301, {"Location": "http://127.0.0.1:9/"}),
    "302-file": (302, {"Location": "file:///etc/passwd"}),
    "307-self": (307, {"Location": "/queue"}),
    "401": (401, {"WWW-Authenticate": "Basic"}),
    "403": (403, {}),
    "404": (404, {}),
    "405": (405, {}),
    "418": (418, {}),
    "429": (429, {}),
    "429-soon": (429, {"Retry-After": "0"}),
    "429-late": (429, {"Retry-After": "9" * 300}),
    "429-odd": (429, {"Retry-After": "-1; soon\u00b2"}),
    "429-date": (429, {"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}),
    "500": (500, {}),
    "502": (502, {}),
    "503": (503, {}),
    "503-late": (503, {"Retry-After": "3600"}),
    "204": (204, {}),
    "206": (206, {}),
    "999": (999, {}),
}
# What is sent in place of an answer, as it is.
RAW = {
    "nothing": b"",
    "no-http": b"hello\r\n\r\n",
    "binary": bytes(range(256)) * 8,
    "tls": b"\x15\x03\x01\x00\x02\x02\x46",
    "half-status": b"HTTP/1.1 20",
    "half-head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "status-0": b"HTTP/1.1 0 \r\n\r\n",
    "status-text": b"HTTP/1.1 OK 200\r\n\r\n",
    "version-9": b"HTTP/9.9 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    "long-reason": b"HTTP/1.1 500 " + b"x" * 100_000 + b"\r\n\r\n",
    "long-field": b"HTTP/1.1 200 OK\r\nA: " + b"x" * 100_000 + b"\r\n\r\n",
    "many-fields": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 50_000 + b"\r\n",
    "length-short": b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{}",
    "length-negative": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}",
    "length-text": b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n{}",
    "length-huge": b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999999\r\n\r\n{}",
    "lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 9\r\n\r\n{}",
    "chunk-bad": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "chunk-cut": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{}",
    "chunk-huge": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n{}",
    "gzip-lie": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    "cookie": b"HTTP/1.1 200 OK\r\nSet-Cookie: "
    + b"a=b; " * 900
    + b"\r\nContent-Length: 1\r\n\r\n7",
    "switch": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n",
    "continues": b"HTTP/1.1 100 Continue\r\n\r\n" * 200,
}
_HEAD = b"HTTP/1.1 200 OK\r\n"
# A beginning, and what follows again and again, with a pause (s) in between.
ENDLESS = {
    "endless-body": (_HEAD + b"\r\n", b" " * 65536, 0.0),
    "endless-json": (_HEAD + b'\r\n{"queue_running": [', b"[0]," * 9999, 0.0),
    "endless-chunks": (
        _HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
        b"10000\r\n" + b"[" * 65536 + b"\r\n",
        0.0,
    ),
    "endless-error": (b"HTTP/1.1 400 Bad\r\n\r\n", b"x" * 65536, 0.0),
    "endless-head": (_HEAD, b"A: b\r\n" * 999, 0.0),
    "endless-continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.0),
    "endless-field": (_HEAD + b"A: ", b"x" * 65536, 0.0),
    "drip-body": (_HEAD + b"\r\n", b" ", 0.05),
    "drip-head": (_HEAD, b"A", 0.05),
    "drip-error": (b"HTTP/1.1 500 Bad\r\n\r\n", b"x", 0.05),
    "silence": (b"", b"", 0.05),
    "silent-body": (_HEAD + b"Content-Length: 5\r\n\r\n", b"", 0.05),
}


# Any bytes are a good result, where the rest of the answer is in order.
_GOOD_RESULTS = {*BODIES, "version-9", "cookie"}


def _frame(opcode, payload, *, size=None, final=True, reserved=0):
    size = len(payload) if size is None else size
    head = bytes([(0x80 if final else 0) | reserved | opcode])
    if size < 126:
        return head + bytes([size]) + payload
    return (
        head
        + (
            bytes([126]) + struct.pack(">H", size)
            if size < 65536
            else bytes([127]) + struct.pack(">Q", size)
        )
        + payload
    )


def _text(value):
    return _frame(1, (value if isinstance(value, str) else json.dumps(value)).encode())


# What a websocket says once it is open: (first, again and again, pause).
SOCKET = {
    "null": (_text("null"), b"", 0.05),
    "types": (b"".join(_text({"type": v}) for v in VALUES.values()), b"", 0.05),
    "data": (
        b"".join(
            _text({"type": kind, "data": value})
            for kind in ("executing", "progress", "status")
            for value in VALUES.values()
        ),
        b"",
        0.05,
    ),
    "deep": (_text("[" * 50_000), b"", 0.05),
    "no-utf8": (_frame(1, b"\xff\xff"), b"", 0.05),
    "huge": (_frame(1, b"x", size=1 << 62), b"x" * 65536, 0.0),
    "flood": (b"", _text({"type": "progress", "data": {"value": 1, "max": 2}}) * 50, 0.0),
    "binary-flood": (b"", _frame(2, b"x" * 65000), 0.0),
    "endless-fragments": (_frame(1, b"[", final=False), _frame(0, b"[" * 65000, final=False), 0.0),
    "pings": (b"", _frame(9, b"x"), 0.0),
    "bad-opcode": (_frame(11, b"x"), b"", 0.05),
    "reserved": (_frame(1, b"x", reserved=0x40), b"", 0.05),
    "closes": (_frame(8, struct.pack(">H", 1000)), None, 0.0),
    "closes-oddly": (_frame(8, b"\x00"), None, 0.0),
    "breaks": (b"\x81", None, 0.0),
    "silent": (b"", b"", 0.05),
    "lies": (b"", "lies", 0.01),
}


def cases():
    """Return the names of all cases."""
    names = [
        f"{endpoint}/{kind}"
        for endpoint in ENDPOINTS
        for kind in (*BODIES, *STATUSES, *RAW, *ENDLESS)
        if not (endpoint == "view" and kind in _GOOD_RESULTS)
    ]
    names += [f"{endpoint}/field-{n}" for endpoint in ENDPOINTS[:-1] for n in range(24)]
    names += ["upload/renames"]
    names += [f"socket/{kind}" for kind in (*SOCKET, "no-accept", "200", "500")]
    names += [f"job/{kind}" for kind in ("fails", "no-files", "refused", "not-ours", "never-ends")]
    names += [f"job/{kind}" for kind in ("forgets", "names", "interrupts", "swaps-ids")]
    return names


class BadComfy(FakeComfy):
    """The server of a case."""

    silence_s = 0.5

    def __init__(self, case, **options):
        self.endpoint, _, self.kind = case.partition("/")
        super().__init__(**options)
        self.http.handle_error = lambda *_: None  # what it is asked for is odd as well

    def handle(self, request, method):
        path = urllib.parse.urlsplit(request.path).path
        name = path.strip("/").split("/")[0]
        if name == "ws" and self.endpoint == "socket":
            self._socket(request)
            return
        if name != self.endpoint or (name == "queue" and method == "POST"):
            super().handle(request, method)
            return
        request.rfile.read(int(request.headers.get("Content-Length", 0)))
        with self.mutex:
            if not self.is_up:
                return
        with contextlib.suppress(OSError):
            self._misbehave(request)

    def answer(self, method, url, body):
        code, answer = super().answer(method, url, body)
        if self.endpoint == "job":
            return self._job(url.path, code, answer, body)
        return code, answer

    def _misbehave(self, request):
        request.close_connection = True
        if self.kind in BODIES:
            self._send(request, 200, {}, BODIES[self.kind])
        elif self.kind in STATUSES:
            status, fields = STATUSES[self.kind]
            self._send(request, status, fields, b'{"detail": "no"}')
        elif self.kind in RAW:
            request.wfile.write(RAW[self.kind])
        elif self.kind in ENDLESS:
            self._go_on(request, *ENDLESS[self.kind])
        elif self.kind == "renames":
            answer = {"name": "another.png", "subfolder": "stylemaster_queue", "type": "input"}
            self._send(request, 200, {}, json.dumps(answer).encode())
        else:
            good = json.dumps(self._good(request)).encode()
            self._send(request, 200, {}, _damaged(good, int(self.kind.rpartition("-")[2])))

    def _good(self, request):
        item = [1, "id", {"1": {"class_type": "A", "inputs": {}}}, {"client_id": "c"}, []]
        file = {"filename": "a.png", "subfolder": "", "type": "output"}
        status = {"status_str": "error", "messages": [["execution_error", {"node_id": "1"}]]}
        prompt_id = request.path.rpartition("/")[2]
        entry = {"prompt": item, "outputs": {"1": {"images": [file]}}, "status": status}
        errors = {"1": {"errors": [{"message": "m", "details": "d"}], "class_type": "A"}}
        return {
            "queue": {"queue_running": [item], "queue_pending": [item]},
            "features": {"max_upload_size": 5},
            "upload": {"name": "a", "subfolder": "b", "type": "input"},
            "prompt": {"prompt_id": "id", "node_errors": errors, "error": {"message": "m"}},
            "history": {prompt_id: entry},
        }[self.endpoint]

    def _send(self, request, status, fields, body):
        head = f"HTTP/1.1 {status} {_ANSI}\r\nContent-Length: {len(body)}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        request.wfile.write(head.encode("utf-8") + b"\r\n" + body)

    def _go_on(self, request, first, again, pause_s):
        request.wfile.write(first)
        while self.is_up and again is not None:
            told = again
            if again == "lies":
                told = b"".join(
                    _text({"type": "executing", "data": {"node": None, "prompt_id": item[1]}})
                    for item in self.queue
                )
            request.wfile.write(told)
            if pause_s:
                time.sleep(pause_s)

    def _socket(self, request):
        request.close_connection = True
        key = request.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        with contextlib.suppress(OSError):
            if self.kind in ("200", "500"):
                self._send(request, int(self.kind), {}, b"{}")
                return
            accept = "no" if self.kind == "no-accept" else accept
            fields = f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept}"
            head = f"HTTP/1.1 101 Switching Protocols\r\n{fields}\r\n\r\n"
            request.wfile.write(head.encode())
            if self.kind in SOCKET:
                self._go_on(request, *SOCKET[self.kind])

    def _job(self, path, code, answer, body):
        """Good answers about jobs that went wrong."""
        entries = answer.values() if path.startswith("/history/") else ()
        if self.kind == "refused" and path == "/prompt":
            return 400, {"error": {"message": _ANSI, "details": "x" * 100_000}, "node_errors": []}
        if self.kind == "swaps-ids" and path == "/prompt":
            return code, answer | {"prompt_id": "somebody-elses"}
        if self.kind == "never-ends" and path.startswith("/history/"):
            return code, {}
        if self.kind == "forgets" and path == "/prompt":
            self.queue.clear()
            self.history.clear()
        if self.kind == "interrupts":
            self.job_s = 1e9
            if path == "/prompt":
                self.end(self.queue[0], [["execution_interrupted", {"node_id": "3"}]])
        for entry in entries:
            if self.kind == "fails":
                message = {"exception_message": _ANSI + "x" * 100_000, "node_id": "\x1b[2J"}
                messages = [["execution_error", message]]
                entry |= {"status": {"status_str": "error", "messages": messages}}
            elif self.kind == "no-files":
                entry |= {"outputs": {}}
            elif self.kind == "not-ours":
                item = json.loads(json.dumps(entry["prompt"]))
                item[2]["2"]["inputs"]["text"] = "another"
                entry |= {"prompt": item}
            elif self.kind == "names":
                file = {"filename": "../../\x1b[31m/etc/passwd\x00", "subfolder": "/", "type": "x"}
                entry |= {"outputs": {"3": {"images": [file]}}}
        return code, answer


def _damaged(data, seed):
    """Put another value at a random place of some JSON, or take the place away."""
    draw = random.Random(seed)
    root = [json.loads(data)]
    places = []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(root)
    node, key = draw.choice(places)
    value = draw.choice([*VALUES.values(), "gone", -1, 1e308, "\x00", True])
    if value == "gone" and node is not root:
        del node[key]
    else:
        node[key] = value
    return json.dumps(root[0]).encode()
