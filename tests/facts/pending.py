"""Which published configs Penstock reads: those of an architecture that a family implements. Facts of the others wait.

A family file that is added has its facts checked at once, and its row here has to go: `test_facts.py` says so.
"""

from __future__ import annotations

from penstock.errors import UnsupportedArchitectureError
from penstock.models import family_of
from tests.facts.tensors import CONFIGS, published_config

PENDING: set[str] = set()

# Configs of families that are built, which must be refused all the same: the key that the error names.
REFUSED: dict[str, str] = {"DeepSeek-V3": "quantization_config"}

STEMS = sorted(path.stem for path in CONFIGS.glob("*.json"))


def architecture(stem: str) -> str:
    return str(published_config(stem)["architectures"][0])


def is_built(stem: str) -> bool:
    try:
        family_of(published_config(stem))
    except UnsupportedArchitectureError:
        return False
    return True


BUILT = [stem for stem in STEMS if is_built(stem)]
READ = [stem for stem in BUILT if stem not in REFUSED]
