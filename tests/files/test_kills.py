"""A job that is killed and started again: kills.py, beside this, has more of them."""

import subprocess
import sys
from pathlib import Path

KILLS = Path(__file__).parent / "kills.py"


def test_a_killed_job_ends_with_the_bytes_of_an_uninterrupted_one():
    done = subprocess.run(
        [sys.executable, str(KILLS), "--kills", "4", "teacher"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("0 of 4 differ\n")
