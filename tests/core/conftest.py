from __future__ import annotations

import pytest

from tests.core.array_libraries import NAMES, ArrayLibrary, array_library_named


@pytest.fixture(params=NAMES)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ArrayLibrary:
    return array_library_named(request.param, monkeypatch)
