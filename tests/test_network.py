"""The guard of tests/conftest.py: what leaves this machine fails, what stays does not."""

import http.server
import socket
import threading
import urllib.request

import pytest


def reach(host, port):
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as one:
        one.settimeout(1)
        one.connect((host, port))


@pytest.mark.parametrize("attempt", [
    lambda: reach("192.0.2.1", 80),                                             # an address nobody has
    lambda: urllib.request.urlopen("http://example.invalid/x", timeout=1),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53)),
    lambda: socket.create_connection(("example.invalid", 80), timeout=1),
])
def test_what_leaves_this_machine_fails(attempt):
    with pytest.raises(pytest.fail.Exception, match="reached out"):
        attempt()


def test_what_stays_does_not():
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"here")

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.handle_request, daemon=True)
        thread.start()
        assert urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/", timeout=5).read() == b"here"
        thread.join()
