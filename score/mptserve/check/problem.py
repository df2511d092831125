"""What `mptserve check` reports: a place, a rule, what is wrong and how to put it right."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, order=True)
class Problem:
    """One mistake. Its rule is a key of RULES (rules.py); the message never repeats a secret's value."""

    path: Path
    line: int
    rule: str
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}: {self.message}. Fix: {self.fix}"
