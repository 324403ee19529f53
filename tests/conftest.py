"""How several processes divide the tests among them: a file stays whole, and so do the rigs of faults."""

from pathlib import Path

import pytest

FAULTS = Path(__file__).parent / "faults"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Name the group of each test: one process runs it, with the fixtures that its tests share."""
    for item in items:
        group = FAULTS if FAULTS in item.path.parents else item.path
        item.add_marker(pytest.mark.xdist_group(str(group)))
