"""Which replica a session belongs to: the documented form, and how much moves when replicas come and go."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwell._routing.ranking import key_of, key_of_request, keys_of, weight, weights
from stepwell._routing.replica import Replica
from stepwell._routing.router import Router
from stepwell._transport.connecting import ConnectError
from stepwell.v1 import sessions_pb2

IDS = st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=50)
ADDRESSES = st.lists(
    st.integers(1, 65535).map(lambda port: f"10.0.0.1:{port}"), min_size=1, max_size=6, unique=True
)


def router(*addresses: str) -> Router:
    return Router(addresses, lambda: 0.0)


def test_the_form_is_the_documented_one() -> None:
    """Numbers that no release may change: clients of several releases share replicas."""
    assert key_of("user-42") == int.from_bytes(hashlib.blake2b(b"user-42", digest_size=8).digest(), "little")
    assert key_of("user-42") == 0xA6EFE67B4DCAA06F
    assert weight(key_of("user-42"), key_of("10.0.0.1:50051")) == 0xD8A51FD636F8AF3B
    assert weight(0x9E3779B97F4A7C15, 0) == 0xE220A8397B1DCDAF  # SplitMix64's first number with the seed 0


def test_an_address_is_the_same_however_it_is_written() -> None:
    assert Replica("Host.Example:1").seed == Replica("host.example:1").seed
    assert Replica("unix:/A").seed != Replica("unix:/a").seed


@given(IDS, ADDRESSES)
def test_one_and_many_agree(ids: list[str], addresses: list[str]) -> None:
    keys = keys_of(ids)
    assert keys.tolist() == [key_of(one) for one in ids]
    for address in addresses:
        seed = key_of(address)
        assert weights(keys, seed).tolist() == [weight(int(key), seed) for key in keys]
    chooses = router(*addresses)
    chooses.replicas[0].parts = 3
    if len(addresses) > 2:
        chooses.replicas[1].is_down = True
    for tried in ((), chooses.replicas[:1], chooses.replicas):
        replicas, of = chooses.choose_all(keys, tried)
        found = [replicas[i] for i in of.tolist()]
        assert found == [chooses.choose(int(key), tried) for key in keys]


@given(IDS, ADDRESSES)
def test_the_order_of_addresses_does_not_matter(ids: list[str], addresses: list[str]) -> None:
    one, other = router(*addresses), router(*reversed(addresses))
    for key in keys_of(ids).tolist():
        assert one.choose(key).address == other.choose(key).address


@given(IDS, ADDRESSES.filter(lambda addresses: len(addresses) > 1))
def test_a_replica_that_leaves_moves_its_own_sessions_alone(ids: list[str], addresses: list[str]) -> None:
    before, after = router(*addresses), router(*addresses[1:])
    down = router(*addresses)
    down.failed(down.replicas[0], 0, ConnectError("refused"))
    for key in keys_of(ids).tolist():
        was = before.choose(key).address
        now = after.choose(key).address
        assert now == was or was == addresses[0]
        # one that is down is as one that is not there
        assert down.choose(key).address == now


def test_sessions_are_shared_evenly() -> None:
    keys = keys_of([f"user-{i}" for i in range(30_000)])
    _, of = router("a:1", "b:1", "c:1").choose_all(keys)
    assert np.bincount(of).min() > 9_500


@pytest.mark.parametrize(
    ("request_", "key"),
    [
        (sessions_pb2.GetStateRequest(session_id="one"), key_of("one")),
        (sessions_pb2.GetStatesRequest(session_ids=["two", "one"]), key_of("two")),
        (sessions_pb2.OpenSessionRequest(session_id="one", request_id=7), key_of("one")),
        (sessions_pb2.ListSessionsRequest(), 99),
    ],
)
def test_what_a_request_is_about(request_: object, key: int) -> None:
    assert key_of_request(request_, 99) == key


def test_sessions_without_names_are_opened_anywhere() -> None:
    keys = {key_of_request(sessions_pb2.OpenSessionRequest(request_id=7), 99) for _ in range(20)}
    assert len(keys) == 20
