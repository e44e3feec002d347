"""The local server's command line: what it refuses, with exit code 2 and no traceback. About 3 s."""

import socket

import pytest

from tests.tools.pairs.support import run


def test_a_taken_port_is_told():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = run("oracle_server", "--port", str(port), check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"cannot listen on 127.0.0.1, port {port}" in done.stderr
    assert "choose another --port" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--policy", "owner/name"], ["--policy owner/name", "no config.json"]),
        (["--port", "70000"], ["--port", "65535"]),
    ],
)
def test_options_that_cannot_be_are_refused(options, words):
    done = run("oracle_server", *options, check=False)
    assert done.returncode == 2
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr
