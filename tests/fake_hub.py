"""A hub of one's own on localhost: enough of the API for `snapshot_download`, with gated and missing repositories.

Run as a script it serves a folder of repositories (owner/name/files) until it is killed, and prints its address.
"""

import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    root = Path()
    gated = "gated"

    def log_message(self, *_):
        pass

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        headers.setdefault("Content-Length", len(body))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0].strip("/")
        words = path.split("/")
        if path == "unplug":
            self.answer(200)
            return threading.Thread(target=lambda: (self.server.shutdown(), self.server.server_close())).start()
        if words[:2] == ["api", "models"] and len(words) >= 4:
            repo = self.root / words[2] / words[3]
            if not repo.is_dir():
                return self.answer(401, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository Not Found")
            files = sorted(str(p.relative_to(repo)) for p in repo.rglob("*") if p.is_file())
            if "tree" in words[4:5]:
                rows = [{"type": "file", "path": f, "size": (repo / f).stat().st_size, "oid": "0" * 40} for f in files]
                return self.answer(200, json.dumps(rows).encode(), Content_Type="application/json")
            info = {
                "id": f"{words[2]}/{words[3]}",
                "modelId": f"{words[2]}/{words[3]}",
                "sha": COMMIT,
                "private": False,
                "siblings": [{"rfilename": f} for f in files],
                "tags": [],
                "downloads": 0,
            }
            return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        if "resolve" in words:
            owner, name, _, _, *file = words
            if owner == self.gated:
                return self.answer(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
            place = self.root / owner / name / "/".join(file)
            if not place.is_file():
                return self.answer(404, b"{}", X_Error_Code="EntryNotFound")
            body = place.read_bytes()
            etag = '"' + hashlib.sha256(body).hexdigest()[:40] + '"'
            return self.answer(200, body, ETag=etag, X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
        return self.answer(404, b"{}")

    do_HEAD = do_GET


def serve(root: Path) -> ThreadingHTTPServer:
    """A server on a free port; call serve_forever."""
    return ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Hub,), {"root": root}))


if __name__ == "__main__":
    server = serve(Path(sys.argv[1]))
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
