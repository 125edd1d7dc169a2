"""Quotas and the callers they are for: token buckets, the quota file, names and namespaces of tenants."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwell_server.auth.quota_file import COUNTED_BY_TENANT, QuotaFile, parse
from stepwell_server.core import namespaces
from stepwell_server.core.callers import Caller, Role, is_name
from stepwell_server.core.quotas import Buckets, Limits, QuotaTable, TokenBucket
from stepwell_server.errors import PermissionDenied, StartError
from stepwell_server.rpc.access import access_of, require

FILE = """
[default]
sessions = 100
[tenants.acme]
rows = 5
steps_per_second = 2.5
bytes_in_flight = 1000
[callers."acme/ann"]
steps_per_second = 10
burst = 30
[callers.root]
bytes_in_flight = 1
"""


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(1, 12)), max_size=40), st.floats(1, 50))
def test_a_bucket_gives_no_more_than_its_rate_and_its_delay_is_enough(
    asked: list[tuple[float, int]], rate: float
) -> None:
    now, bucket, taken = 5.0, TokenBucket(rate, 10, 5.0), 0
    for pause_s, count in asked:
        now += pause_s
        delay_s = bucket.take(count, now)
        if delay_s and count <= 10:
            now += delay_s * (1 + 1e-9) + 1e-9
            assert bucket.take(count, now) == 0, "it was told when"
            taken += count
        elif not delay_s:
            taken += count
        assert taken <= 10 + rate * (now - 5.0) + 1e-6


def test_a_bucket_keeps_what_was_taken_when_its_limits_change_and_is_forgotten_when_full() -> None:
    buckets, before = Buckets(), Limits(steps_per_second=10)
    assert buckets.of("a", before, 0.0).take(10, 0.0) == 0
    assert buckets.of("a", before, 0.0).take(5, 0.0) == 0.5
    assert buckets.of("a", Limits(steps_per_second=100, burst=1000), 0.0).take(5, 0.0) == 0.05
    bucket = TokenBucket(1, 4, 0.0)
    assert bucket.is_full(0.0)
    bucket.take(3, 0.0)
    bucket.give_back(1)
    assert not bucket.is_full(1.0)
    assert bucket.is_full(2.0)


def test_a_file_says_whose_quotas_are_which() -> None:
    table = parse(FILE)
    assert table.of_tenant("") == table.of_tenant("other") == Limits(sessions=100)
    assert table.of_tenant("acme") == Limits(rows=5, steps_per_second=2.5, bytes_in_flight=1000)
    assert table.of_tenant("acme").max_steps == 2
    assert table.callers == {
        "acme/ann": Limits(steps_per_second=10, burst=30),
        "root": Limits(bytes_in_flight=1),
    }
    assert parse("") == QuotaTable()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[default", "must be TOML: "),
        ("[tenant.a]", "must have tables default, tenants, callers only; got 'tenant'"),
        ("default = 3", r"\[default\] must be a table; got 3"),
        ("[tenants]\nacme = 3", r"\[tenants.acme\] must be a table; got 3"),
        ('[tenants."a b"]', r"\[tenants\] must be named by names of tenants; got 'a b'"),
        ('[callers."a b/c"]', r'\[callers\] must be named "TENANT/NAME", .*; got \'a b/c\''),
        ('[callers."a/b c"]', r'\[callers\] must be named "TENANT/NAME", .*; got \'a/b c\''),
        ('[callers."/c"]', r'\[callers\] must be named "TENANT/NAME", .*; got \'/c\''),
        ('[callers."a/"]', r'\[callers\] must be named "TENANT/NAME", .*; got \'a/\''),
        ('[callers."b:c"]', r'\[callers\] must be named "TENANT/NAME", .*; got \'b:c\''),
        ("[default]\nstep = 1", r"\[default\] must have sessions, .* only; got 'step'"),
        ("[callers.a]\nmodels = 1", r'\[callers."a"\] must have sessions, rows, .* only; got'),
        ("[default]\nsessions = -1", r"sessions must be a whole number from 0 to .*; got -1"),
        ("[default]\nrows = 1.5", r"rows must be a whole number from 0 to .*; got 1.5"),
        ("[default]\nrows = true", r"rows must be a whole number from 0 to .*; got True"),
        (
            "[default]\nsteps_per_second = inf",
            r"steps_per_second must be a number from 1 to .*; got inf",
        ),
        (
            f"[default]\nrows = {10**400}",
            r"rows must be a whole number from 0 to \d+; got 1(0+)\.\.\.$",
        ),
        (f"a = {'9' * 9999}", "must be TOML: "),
        (f"a = {'[' * 9999}", "must be TOML: "),
        ("[default]\nburst = 3", r"\[default\] burst must be given with steps_per_second"),
    ],
)
def test_a_file_that_breaks_a_rule_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_a_file_is_read_again_when_it_changes_and_a_broken_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, other = tmp_path / "quotas.toml", tmp_path / "other"
    with pytest.raises(StartError, match=r"^--quotas: .*quotas.toml: must be .* read; No such file"):
        QuotaFile(path)
    path.write_text("[default]\nsessions = 1\n")
    file = QuotaFile(path)

    def looks() -> list[bool]:
        return [file.look() for _ in range(3)]

    assert looks() == [False] * 3
    other.write_text("[default]\nsessions = 2\n")
    os.replace(other, path)
    assert looks() == [False, True, False]  # it may still be being written when it is seen first
    assert file.table.default.sessions == 2
    broken = ["[default]\nsessions = none\n", f"a = {'[' * 9999}", f"[default]\nrows = {'9' * 9999}\n"]
    for text in broken:
        path.write_text(text)
        assert looks() == [False] * 3
    path.write_text("[default]\nsessions = 7\n")
    path.chmod(0o646)  # whoever can write it could lift its own quotas
    assert looks() == [False] * 3
    path.unlink()
    assert looks() == [False] * 3
    assert file.table.default.sessions == 2
    assert caplog.text.count("the changed quotas cannot be used") == len(broken) + 2  # once for each change
    path.write_text("[default]\nsessions = 3\n")
    path.chmod(0o644)
    assert looks() == [False, True, False]
    assert file.table.default.sessions == 3


def test_callers_whom_others_name_have_quotas_too() -> None:
    names = ("acme/auth0|1234", "acme/system:serviceaccount:shop:web", "acme/spiffe://acme.example/web")
    table = parse("\n".join(f'[callers."{name}"]\nsteps_per_second = 9' for name in names))
    assert set(table.callers) == set(names)


def test_callers_have_no_sessions_of_their_own_in_a_store_that_servers_share() -> None:
    text = '[callers."acme/ann"]\nrows = 5\nsteps_per_second = 9'
    assert parse(text).callers["acme/ann"].rows == 5
    with pytest.raises(
        ValueError, match=r'\[callers."acme/ann"\] rows must be left out if servers share a store'
    ):
        parse(text, only_tenants=COUNTED_BY_TENANT)
    assert (
        parse(text.replace("rows = 5", ""), only_tenants=COUNTED_BY_TENANT)
        .callers["acme/ann"]
        .steps_per_second
        == 9
    )


@pytest.mark.parametrize("text", ["acme", "a", "robot-7@lab.example", "A" * 64])
def test_names(text: str) -> None:
    assert is_name(text)


@pytest.mark.parametrize("text", ["", "-a", "a b", "a\x1fb", "a/b", "A" * 65, "acme\n", "ä"])
def test_no_names(text: str) -> None:
    assert not is_name(text)


@pytest.mark.parametrize("session_id", ["user", "\\x1f", "a\x1fb", ""])
def test_ids_go_into_a_namespace_and_come_back(session_id: str) -> None:
    inner = namespaces.prefix_of("acme") + session_id
    assert (namespaces.tenant_of(inner), namespaces.own(inner)) == ("acme", session_id)


def test_without_tenants_ids_stay_as_they_are() -> None:
    assert (namespaces.prefix_of(""), namespaces.tenant_of("user"), namespaces.own("user")) == (
        "",
        "",
        "user",
    )


def test_messages_show_the_ids_that_callers_know() -> None:
    inner = "acme\x1fit's \\x1f"
    told = namespaces.without_tenants(f"session {inner!r} is open, and so is {inner}")
    assert told == f"session {namespaces.own(inner)!r} is open, and so is {namespaces.own(inner)}"


@pytest.mark.parametrize(
    ("method", "allowed"),
    [
        ("Check", {Role.VIEWER, Role.USER, Role.ADMIN}),
        ("GetState", {Role.VIEWER, Role.USER, Role.ADMIN}),
        ("Step", {Role.USER, Role.ADMIN}),
        ("ModelStreamInfer", {Role.USER, Role.ADMIN}),
        ("AMethodThatNobodyThoughtOf", {Role.USER, Role.ADMIN}),
    ],
)
def test_roles(method: str, allowed: set[Role]) -> None:
    for role in Role:
        caller = Caller("ann", "acme", role)
        if role in allowed:
            require(access_of(method), method, caller)
            continue
        with pytest.raises(PermissionDenied) as raised:
            require(access_of(method), method, caller)
        assert (
            str(raised.value)
            == f"{method} needs the role admin or user; caller 'acme/ann' has the role {role.value}"
        )
