"""In which order the processes of a run import test modules, and that all agree on the order of the tests."""

from __future__ import annotations

import pytest

from support.import_order import ImportOrder

pytest_plugins = ["pytester"]

FILES = [
    *(f"last/test_{name}.py" for name in "ab"),
    *(f"first/test_{name}.py" for name in "abcde"),
    "first/deeper/test_b.py",
]


def run(pytester: pytest.Pytester, worker: int) -> tuple[list[str], list[str]]:
    """The modules in the order of their imports, and the tests in theirs."""
    log = pytester.path / f"imported_by_{worker}"
    for name in FILES:
        file = pytester.path / name
        file.parent.mkdir(exist_ok=True, parents=True)
        note = f"with open({str(log)!r}, 'a') as log: print({name!r}, file=log)\n"
        file.write_text(f"{note}def test_2(): pass\ndef test_1(): pass\n")
    found = list[str]()

    class Found:
        def pytest_collection_finish(self, session: pytest.Session) -> None:
            found.extend(item.nodeid for item in session.items)

    arguments = ("--collect-only", "-pno:asyncio", "--import-mode=importlib", "last", "first")
    pytester.inline_run(*arguments, plugins=[ImportOrder(worker, 3), Found()])
    return log.read_text().split(), found


def test_each_process_begins_with_its_part_and_all_have_the_tests_in_the_same_order(
    pytester: pytest.Pytester,
) -> None:
    orders, tests = zip(*(run(pytester, worker) for worker in range(3)), strict=True)
    assert [[name for name in order if name.startswith("first/test")] for order in orders] == [
        [f"first/test_{name}.py" for name in names] for names in ("adbec", "becad", "cadbe")
    ]
    assert all(sorted(order) == sorted(FILES) for order in orders)
    in_order = sorted(FILES, key=lambda name: (name.startswith("first"), name))
    assert [*tests] == [[f"{name}::test_{number}" for name in in_order for number in (2, 1)]] * 3
