"""The server of metrics and of the live report: it reads, and only for who asks properly."""

from __future__ import annotations

import socket

import pytest
from clients import closed_by_server, get, raw, serving, silent
from injuring import until

from service.monitoring.http_server import MOST_CONNECTIONS, Answer, is_address

HI = Answer(200, b"hi")


@pytest.mark.parametrize(
    ("host", "answered"),
    [
        ("127.0.0.1", True),
        ("127.0.0.1:9400", True),
        ("[::1]:9400", True),
        ("::1", True),
        ("localhost:9400", True),
        ("LOCALHOST", True),
        ("localhost.localdomain:9400", True),
        ("localhost.", True),
        ("127.0.0.2:9400", True),
        ("localdomain", False),
        ("evil.example", False),
        ("evil.example:9400", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example:80", False),
        ("", False),
    ],
)
def test_a_name_that_points_here_is_not_answered(host: str, answered: bool) -> None:
    assert is_address(host) == answered
    with serving(HI, names_allowed=False) as port:
        assert get(port, "/", Host=host).status == (200 if answered else 421)
    with serving(HI) as port:
        assert get(port, "/", Host=host).status == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"POST / HTTP/1.1\r\n\r\n", b"405"),
        (b"DELETE / HTTP/1.1\r\n\r\n", b"405"),
        (b"GET /\r\n\r\n", b"400"),
        (b"GET / HTTP/2\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\xff\r\n\r\n", b"400"),
        (b"GET http://[ HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /?" + b"&".join(b"a=1" for _ in range(200)) + b" HTTP/1.1\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 9000 + b"\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5000 + b"\r\n", b"431"),
        (b"HEAD / HTTP/1.1\r\n\r\n", b"200"),
    ],
)
def test_what_is_no_request_gets_an_answer_that_says_so(sent: bytes, status: bytes) -> None:
    with serving(HI) as port:
        answer = raw(port, sent)
    assert answer.split(b" ")[1] == status
    assert answer.endswith(b"\r\n\r\n") == sent.startswith(b"HEAD"), "no body for HEAD"


def test_silent_clients_are_closed_for_one_that_asks() -> None:
    with serving(HI) as port:
        waiting = silent(port, 3 * MOST_CONNECTIONS)
        assert get(port, "/").text == "hi"
        assert closed_by_server(waiting[0])
        assert closed_by_server(waiting[-1]), "after some seconds"
        for each in waiting:
            each.close()


def test_clients_that_take_nothing_of_a_large_answer_hold_up_nobody() -> None:
    large = Answer(200, b"x" * (8 << 20))
    with serving(large) as port:
        slow = silent(port, MOST_CONNECTIONS)
        for each in slow:
            each.sendall(b"y\r\n\r\n")  # the end of its request; it reads nothing
            until(lambda each=each: has_an_answer(each), "it is being answered")
        for _ in range(3):
            assert len(get(port, "/").text) == 8 << 20
        for each in slow:
            each.close()


def has_an_answer(connection: socket.socket) -> bool:
    """Whether something can be read, which stays unread."""
    return connection.recv(1, socket.MSG_PEEK) != b""
