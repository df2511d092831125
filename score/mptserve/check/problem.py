"""What `mptserve check` reports: file and line, rule, message and fix."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, order=True)
class Problem:
    """One mistake. `rule` is a key of RULES (rules.py). The message never contains the value of a secret."""

    path: Path
    line: int
    rule: str
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}: {self.message}. Fix: {self.fix}"
