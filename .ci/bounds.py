"""Print the lowest supported release of each dependency in pyproject.toml, as constraints for pip."""

import re
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
GROUPS = [
    PROJECT["dependencies"],
    *(PROJECT["optional-dependencies"][extra] for extra in ("vision", "plots", "topology", "dev")),
]

for requirement in sorted({requirement for group in GROUPS for requirement in group}):
    bound = re.match(r"([\w-]+)>=([\d.]+)", requirement)
    if bound:
        print(f"{bound[1]}=={bound[2]}")
