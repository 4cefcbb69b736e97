"""Fixtures that run against each ComfyUI found (see `server.find_comfyui`)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.comfy import record, server, small_models
from tests.comfy.comparing import Numbers

CHECKOUTS = server.find_comfyui()
NONE_FOUND = pytest.param(
    None,
    id="no-comfyui",
    marks=pytest.mark.skip(
        reason="no ComfyUI found: set COMFYUI_PATH to the folder that contains custom_nodes"
    ),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.comfy)


# By version of ComfyUI and test file: how many passed, failed, were skipped.
OUTCOMES: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))


def pytest_addoption(parser: pytest.Parser) -> None:
    text = f"write what passed on which ComfyUI into {record.RECORD.name}"
    parser.addoption("--record-comfyui", action="store_true", help=text)


def pytest_report_header() -> list[str]:
    return [f"ComfyUI {found.version}: {found.path} ({found.python})" for found in CHECKOUTS]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    kept = record.read()
    for found in CHECKOUTS:
        if not (outcomes := OUTCOMES.get(found.version)):
            continue
        total = dict(sum(outcomes.values(), Counter()))
        terminalreporter.write_line(f"ComfyUI {found.version}: {total}")
        kept = record.add_results(kept, found.version, record.setting(found), outcomes)
    if config.getoption("--record-comfyui", default=False):
        record.write(kept)


def _note_outcome(item: pytest.Item, report: pytest.TestReport) -> None:
    checkout = getattr(item, "callspec", None) and item.callspec.params.get("comfy_checkout")
    told = report.when == "call" or (report.when == "setup" and not report.passed)
    if checkout and (told or report.failed):
        OUTCOMES[checkout.version][item.path.name][report.outcome] += 1


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Show the server's log with a test that failed; count by version."""
    report = yield
    _note_outcome(item, report)
    used = getattr(item, "funcargs", {}).get("comfy_server")
    if report.failed and used is not None:
        report.sections.append(("ComfyUI's log", used.log_tail()))
    return report


@pytest.fixture(
    scope="session",
    params=[pytest.param(found, id=found.version) for found in CHECKOUTS] or [NONE_FOUND],
)
def comfy_checkout(request: pytest.FixtureRequest) -> server.Checkout:
    return request.param


@pytest.fixture(scope="session")
def comfy_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `models` folder of small random models."""
    folder = tmp_path_factory.mktemp("comfy") / "models"
    small_models.write_small_models(folder)
    return folder


@pytest.fixture(scope="session")
def comfy_server(
    comfy_checkout: server.Checkout, comfy_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[server.ComfyServer]:
    """A running server with the pack, the stubs and small models."""
    base = tmp_path_factory.mktemp("server") / "base"
    with server.ComfyServer(comfy_checkout, base, comfy_models) as running:
        yield running


@pytest.fixture(scope="session")
def run_in_comfy(
    comfy_checkout: server.Checkout, comfy_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """Run a script (a path, or its source) inside ComfyUI; returns the JSON of its last line."""

    def run(script: str | Path, *arguments: object) -> dict[str, Any]:
        if isinstance(script, str):
            path = tmp_path_factory.mktemp("script") / "script.py"
            path.write_text(script)
            script = path
        words = [str(argument) for argument in arguments]
        return server.run_script(comfy_checkout, comfy_models.parent, script, *words)

    return run


@pytest.fixture(scope="module")  # `numbers` is each file's own
def results(numbers: Numbers) -> dict[str, Tensor]:
    """What a file's script computed."""
    return numbers[0]


@pytest.fixture(scope="module")
def facts(numbers: Numbers) -> dict[str, Any]:
    """What a file's script said beside it."""
    return numbers[1]
