"""The documentation says what the code says: made pages are fresh."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import config_reference  # noqa: E402


def test_configuration_reference_is_fresh() -> None:
    assert config_reference.TARGET.read_text() == config_reference.page(), "run python scripts/config_reference.py"
