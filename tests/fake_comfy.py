"""A ComfyUI server on loopback that does what it is told to: the queue's counterpart in tests."""

import json
import re
import threading
import time
import urllib.parse
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WORKFLOW = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "own.png"}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "own", "clip": ["9", 0]}},
    "3": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
}


class FakeComfy:
    """A ComfyUI on loopback; its prompts take `job_s` seconds, one after the other."""

    fields = {}  # of every answer
    silence_s = 20.0  # how long a client should wait for an answer

    def __init__(self, job_s=0.0):
        self.job_s = job_s
        self.mutex = threading.RLock()
        self.inputs = {}  # path -> content
        self.uploads = Counter()
        self.finished = []  # texts of the prompts that were carried out
        self.views = Counter()
        self.posts = []
        self.interrupted = []
        self.own_ids = False  # choose prompt ids itself, as old servers do
        self.drop = {}  # "POST /prompt" -> how often to break off after having done it
        self.die_in_view = False
        self.reject = {}  # text of a prompt -> body of the 400
        self.fail = {}  # text of a prompt -> messages of its status
        self.no_files = False
        self.max_upload_bytes = 1000
        self.at_work = 0  # requests
        self.port = 0
        self.restart()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def restart(self):
        """Start with an empty queue and history; the input folder is still there."""
        self.queue, self.history, self.started = [], {}, None
        self.is_up = True
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                self.do("GET")

            def do_POST(self):
                self.do("POST")

            def do(self, method):
                with fake.mutex:
                    fake.at_work += 1
                try:
                    fake.handle(self, method)
                finally:
                    with fake.mutex:
                        fake.at_work -= 1

        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def die(self):
        self.is_up = False
        self.http.server_close()
        threading.Thread(target=self.http.shutdown).start()

    def advance(self):
        """Carry out what had the time for it."""
        while self.queue:
            _, prompt_id, prompt, _, _ = item = self.queue[0]
            self.started = self.started or time.monotonic()
            if time.monotonic() < self.started + self.job_s:
                return
            self.end(item, self.fail.get(prompt["2"]["inputs"]["text"]))

    def end(self, item, messages=None):
        _, prompt_id, prompt, _, _ = item
        self.queue.remove(item)
        self.started = None
        outputs = {}
        if not messages:
            self.finished.append(prompt["2"]["inputs"]["text"])
            image = {"filename": f"{prompt_id}.png", "subfolder": "", "type": "output"}
            preview = image | {"filename": "preview.png", "type": "temp"}
            outputs = {"3": {"images": [image]}, "4": {"images": [preview], "text": ["hello"]}}
        self.history[prompt_id] = {
            "prompt": item,
            "outputs": {} if self.no_files else outputs,
            "status": {"status_str": "error" if messages else "success", "messages": messages},
        }

    def handle(self, request, method):
        url = urllib.parse.urlsplit(request.path)
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        with self.mutex:
            if not self.is_up:
                return
            self.advance()
            if method == "POST":
                self.posts.append(url.path)
            code, answer = self.answer(method, url, body)
            key = f"{method} {url.path}"
            if self.drop.get(key, 0) > 0:
                self.drop[key] -= 1
                return  # the connection ends without an answer
        if isinstance(answer, dict):
            answer = json.dumps(answer).encode()
        request.send_response(code)
        request.send_header("Content-Length", str(len(answer)))
        for name, value in self.fields.items():
            request.send_header(name, value)
        request.end_headers()
        if self.die_in_view and url.path == "/view":
            request.wfile.write(answer[:3])
            self.die()
        else:
            request.wfile.write(answer)

    def answer(self, method, url, body):
        if url.path == "/features":
            return 200, {"max_upload_size": self.max_upload_bytes}
        if url.path == "/queue" and method == "GET":
            return 200, {"queue_running": self.queue[:1], "queue_pending": self.queue[1:]}
        if url.path == "/queue":
            ids = json.loads(body)["delete"]
            self.queue[1:] = [item for item in self.queue[1:] if item[1] not in ids]
            return 200, b""
        if url.path == "/interrupt":
            assert self.queue[0][1] == json.loads(body)["prompt_id"]
            self.interrupted.append(self.queue[0][2]["2"]["inputs"]["text"])
            self.end(self.queue[0], [["execution_interrupted", {"node_id": "3"}]])
            return 200, b""
        if url.path.startswith("/history/"):
            prompt_id = url.path.rpartition("/")[2]
            return 200, {k: v for k, v in self.history.items() if k == prompt_id}
        if url.path == "/prompt":
            return self.post_prompt(json.loads(body))
        if url.path == "/upload/image":
            return self.post_upload(body)
        if url.path == "/view":
            query = dict(urllib.parse.parse_qsl(url.query))
            assert query["type"] == "output"
            prompt = self.history[query["filename"].removesuffix(".png")]["prompt"][2]
            self.views[prompt["2"]["inputs"]["text"]] += 1
            style = self.inputs.get(prompt["1"]["inputs"]["image"], b"own")
            return 200, prompt["2"]["inputs"]["text"].encode() + b"|" + style
        return 404, b"no such page"

    def post_prompt(self, body):
        text = body["prompt"]["2"]["inputs"]["text"]
        if text in self.reject:
            return 400, self.reject[text]
        prompt_id = f"server-{len(self.posts)}" if self.own_ids else body["prompt_id"]
        self.queue.append([0, prompt_id, body["prompt"], {"client_id": body["client_id"]}, []])
        return 200, {"prompt_id": prompt_id, "node_errors": {}}

    def post_upload(self, body):
        fields = {
            re.search(rb'name="(\w+)"', part)[1].decode(): part
            for part in body.split(b"\r\n--" + body[2:34])
            if b"name=" in part
        }
        name = re.search(rb'filename="(.+?)"', fields["image"])[1].decode()
        content = fields["image"].partition(b"\r\n\r\n")[2]
        folder = fields["subfolder"].partition(b"\r\n\r\n")[2].decode()
        assert fields["overwrite"].endswith(b"false")
        if self.inputs.setdefault(f"{folder}/{name}", content) != content:
            name = name.replace(".", " (1).")
            self.inputs[f"{folder}/{name}"] = content
        self.uploads[name] += 1
        return 200, {"name": name, "subfolder": folder, "type": "input"}
