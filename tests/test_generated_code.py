"""What `scripts/protos` writes is what is committed."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def generated(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (directory / "ngpu" / "v1").glob("*_pb2*.py*")}


def test_generated_code_is_fresh(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable}
    subprocess.run([ROOT / "scripts" / "protos", tmp_path], check=True, env=environment)
    fresh, committed = generated(tmp_path), generated(ROOT / "protos")
    assert fresh.keys() == committed.keys(), "run scripts/protos"
    assert [name for name in fresh if fresh[name] != committed[name]] == [], "run scripts/protos"
    assert len(fresh) >= 24
