"""What the README shows is what happens."""

import re
import subprocess
import sys
from pathlib import Path

from convert_weights import main

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_example_of_a_reference_verifies(tmp_path):
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len([line for line in example.splitlines() if line and "import" not in line]) <= 10
    subprocess.run([sys.executable, "-c", example], cwd=tmp_path, check=True, capture_output=True)
    assert main(["verify", "--reference", str(tmp_path / "my_wav2vec2")]) == 0
