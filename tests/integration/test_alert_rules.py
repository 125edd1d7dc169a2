"""Alert rules and the dashboard, evaluated by Prometheus's own code on series that a test makes up."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.telemetry.promtool import promtool

_DEPLOY = Path(__file__).parents[2] / "deploy"
_RULES = _DEPLOY / "prometheus"


def _file(name: str) -> Any:
    return yaml.safe_load((_RULES / name).read_text())


def _panels() -> Mapping[str, list[str]]:
    """What each panel of the dashboard asks, with all servers and models chosen."""
    dashboard = json.loads((_DEPLOY / "grafana" / "stepwell.json").read_text())
    return {
        panel["title"]: [
            re.sub(r"\$(job|instance|model)", ".*", target["expr"].replace("$__rate_interval", "5m"))
            for target in panel["targets"]
        ]
        for panel in dashboard["panels"]
        if "targets" in panel
    }


@pytest.mark.parametrize("name", ["alerts.yml", "recording.yml"])
def test_prometheus_can_read_the_rules(name: str) -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", str(_RULES / name))


def test_the_documented_command_gives_each_alert_a_link_that_a_pager_opens(tmp_path: Path) -> None:
    page = (_RULES.parents[1] / "docs" / "operate" / "when-it-breaks.md").read_text()
    (command,) = re.findall(r"^sed -i .*alerts\.yml$", page, re.MULTILINE)
    shutil.copy(_RULES / "alerts.yml", tmp_path)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)  # noqa: S602 - our own documentation
    changed = yaml.safe_load((tmp_path / "alerts.yml").read_text())
    for rule in (rule for group in changed["groups"] for rule in group["rules"]):
        page_url, _, section = rule["annotations"]["runbook_url"].partition("#")
        assert page_url == "https://wiki.example.org/stepwell/docs/operate/when-it-breaks.md"
        assert f"### {rule['alert']}\n" in page
        assert section == rule["alert"].lower()


@pytest.mark.slow
def test_each_alert_fires_for_what_it_is_made_for_and_not_before() -> None:
    promtool("test", "rules", str(_RULES / "tests.yml"))
    firing = {
        name
        for test in _file("tests.yml")["tests"]
        for asked in test["promql_expr_test"]
        for sample in asked["exp_samples"]
        for name in re.findall(r'alertname="(\w+)"', sample["labels"])
    }
    alerts = {rule["alert"] for group in _file("alerts.yml")["groups"] for rule in group["rules"]}
    assert firing == alerts


@pytest.mark.slow
def test_a_rule_that_never_fires_is_found(tmp_path: Path) -> None:
    """What the test above relies on."""
    text = (_RULES / "alerts.yml").read_text()
    for name in ("recording.yml", "tests.yml"):
        (tmp_path / name).write_text((_RULES / name).read_text())
    (tmp_path / "alerts.yml").write_text(
        text.replace("stepwell_store_damaged == 1", "stepwell_store_damaged == 2")
    )
    with pytest.raises(AssertionError, match="StepwellStoreDamaged"):
        promtool("test", "rules", str(tmp_path / "tests.yml"))


def test_sessions_of_a_shared_store_are_counted_once_by_the_dashboard(tmp_path: Path) -> None:
    panels = _panels()
    (shared,) = [test for test in _file("tests.yml")["tests"] if test["name"] == "servers that share a store"]
    asked = [
        (panels["Sessions"][0], "{}", 9),
        (panels["Live sessions"][0], '{model="m"}', 9),
        (panels["Sessions by tenant"][0], '{tenant="acme"}', 9),
        (panels["Default version"][0], '{model="m"}', 3),
        (panels["Default version"][1], '{model="m"}', 1),
    ]
    test = {
        "interval": "1m",
        "input_series": shared["input_series"],
        "promql_expr_test": [
            {"expr": expr, "eval_time": "5m", "exp_samples": [{"labels": labels, "value": value}]}
            for expr, labels, value in asked
        ],
    }
    file = tmp_path / "dashboard.yml"
    file.write_text(yaml.safe_dump({"rule_files": [], "tests": [test]}))
    promtool("test", "rules", str(file))


def test_nothing_adds_up_what_each_server_of_a_store_reports() -> None:
    """Sessions, also those of tenants, and versions are the store's: a sum over its servers is too much."""
    rules = [
        rule
        for name in ("recording.yml", "alerts.yml")
        for group in _file(name)["groups"]
        for rule in group["rules"]
    ]
    asked = [expr for exprs in _panels().values() for expr in exprs] + [rule["expr"] for rule in rules]
    of_the_store = [expr for expr in asked if re.search(r"stepwell_(tenant_)?(sessions|rows)\b", expr)]
    assert len(of_the_store) >= 4
    for expr in of_the_store:
        assert re.search(r"max by \((job, )?store_id, ", expr), expr
